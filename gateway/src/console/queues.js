// Statistics of the queues, for those who run them.

import { call, Refused, session } from "./session.js";

const SVG = "http://www.w3.org/2000/svg";

const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const number = (value) => value.toLocaleString("en");
const signed = (value) => value.toFixed(2).replace("-", "−");
const duration = (seconds) => (seconds >= 90 ? `${(seconds / 60).toFixed(1)} min` : `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`);

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const figure = (title, value, words) => make("section", { class: "figure card" }, make("h2", { class: "caption" }, title), make("b", {}, value), make("small", {}, words));

/** A point with its interval on a line; x runs from 0 to 1000. */
function scale(low, high, point, { from, to, middle, ends, label }) {
  const x = (value) => Math.round(((value - from) / (to - from)) * 1000);
  const svg = draw("svg", { class: "scale", viewBox: "0 0 1000 68", preserveAspectRatio: "none", role: "img", "aria-label": label });
  svg.append(
    draw("line", { class: "axis", x1: 0, x2: 1000, y1: 34, y2: 34 }),
    draw("line", { class: "middle", x1: x(middle), x2: x(middle), y1: 14, y2: 54 }),
    draw("line", { class: "range", x1: x(low), x2: x(high), y1: 34, y2: 34 }),
    draw("ellipse", { class: "point", cx: x(point), cy: 34, rx: 6, ry: 6 }),
  );
  // Text would be stretched with the drawing.
  const row = make("div", { class: "ends" }, ...ends.map((end) => make("span", {}, end)));
  return make("div", {}, svg, row);
}

const TONES = { left: ["tone-a", "Left"], right: ["tone-b", "Right"], tie: ["tone-tie", "Tie"], both_bad: ["tone-bad", "Both bad"] };

function split(verdicts) {
  const all = Object.values(verdicts).reduce((sum, count) => sum + count, 0);
  if (!all) return make("p", {}, "No verdicts yet.");
  const svg = draw("svg", { class: "split", viewBox: "0 0 1000 16", preserveAspectRatio: "none", role: "img", "aria-label": "Verdicts by side shown" });
  let at = 0;
  for (const [key, [tone]] of Object.entries(TONES)) {
    const width = (verdicts[key] / all) * 1000;
    if (width > 0) svg.append(draw("rect", { class: tone, x: at, width: Math.max(1, width - 3), y: 0, height: 16 }));
    at += width;
  }
  const legend = make("ul", { class: "legend" }, ...Object.entries(TONES).map(([key, [tone, name]]) => make("li", {}, make("i", { class: tone }), `${name} ${number(verdicts[key])} (${percent(verdicts[key] / all)})`)));
  return make("div", {}, svg, legend);
}

function raters(list) {
  if (!list.length) return make("p", {}, "Nobody has judged anything yet.");
  const head = make("tr", {}, ...["Person", "Verdicts", "Skipped", "Right on gold", "Left chosen", "Median time"].map((name) => make("th", { scope: "col" }, name)));
  const share = (of) => (of ? [`${percent(of.share)} `, make("small", {}, `${percent(of.interval.low)} – ${percent(of.interval.high)}`)] : ["–"]);
  const rows = list.map((rater) =>
    make("tr", {}, make("td", {}, rater.annotator), make("td", {}, number(rater.judged)), make("td", {}, number(rater.skipped)),
      make("td", {}, ...(rater.gold ? [`${rater.gold.successes} of ${rater.gold.trials} `, make("small", {}, `${percent(rater.gold.interval.low)} – ${percent(rater.gold.interval.high)}`)] : ["–"])),
      make("td", {}, ...share(rater.left)), make("td", {}, rater.seconds ? duration(rater.seconds.median) : "–")));
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "People" }, make("table", { class: "sheet" }, make("thead", {}, head), make("tbody", {}, ...rows)));
}

/** Landis and Koch's words (1977) are about κ and known to everyone who reads such a number. */
function strength(alpha) {
  if (alpha < 0) return "less than by chance: read the guidelines again";
  const words = [[0.2, "slight"], [0.4, "fair"], [0.6, "moderate"], [0.8, "substantial"]];
  return `${words.find(([most]) => alpha <= most)?.[1] ?? "almost perfect"} agreement`;
}

const title = (words) => make("h1", { id: "part-title", tabindex: "-1" }, words);
const block = (title, ...children) => make("section", { class: "block card" }, make("h2", {}, title), ...children);

/** Whether people choose by the side, with an interval that says how sure that is. */
function side({ left, biased }) {
  if (!left) return [make("p", {}, "No verdicts for one side yet.")];
  const { low, high } = left.interval;
  const drawn = scale(low, high, left.share, { from: 0, to: 1, middle: 0.5, ends: ["0 % left", "50 %", "100 % left"], label: `Left chosen in ${percent(left.share)}, between ${percent(low)} and ${percent(high)}` });
  const meaning = biased ? "That is a bias: one half is outside. Sides are random, so comparisons stay fair on average, but people may be choosing without reading." : "One half is inside: no sign of a bias.";
  return [drawn, make("p", {}, `Left was chosen in ${percent(left.share)} of ${number(left.trials)} verdicts for one side (95 %: ${percent(low)} to ${percent(high)}). ${meaning}`)];
}

function panel(queue, all) {
  const { progress, agreement, position, seconds } = all;
  const share = progress.wanted ? progress.verdicts / progress.wanted : 0;
  const open = progress.tasks - progress.done;
  const about = [`${queue.overlap} ${queue.overlap === 1 ? "person judges" : "people judge"} each pair`, queue.rule.from === "traffic" ? "filled from traffic" : "filled by upload"];
  if (progress.gold) about.push(`${progress.gold} gold pairs, ${percent(queue.gold_share)} of what a person sees`);
  if (queue.closed) about.push("closed");
  const interval = agreement.alpha_interval;
  const parts = [
    make("header", {}, title(queue.name), make("p", { class: "lead" }, `${about.join(" · ")}.`)),
    make("div", { class: "figures" },
      figure("Progress", percent(share), `${number(progress.verdicts)} of ${number(progress.wanted)} verdicts; ${number(open)} pairs open, ${number(progress.leased)} on someone's screen.`),
      figure("Agreement", agreement.alpha === null ? "–" : `α ${signed(agreement.alpha)}`, agreement.alpha === null ? "Needs pairs that two people judged, and more than one verdict." : `${strength(agreement.alpha)} over ${number(agreement.tasks)} pairs${interval ? `; 95 % ${signed(interval.low)} to ${signed(interval.high)}` : ""}${agreement.kappa === null ? "" : `; Cohen's κ ${signed(agreement.kappa)}`}.`),
      figure("Time per pair", seconds ? duration(seconds.median) : "–", seconds ? `median; nine in ten within ${duration(seconds.p90)}.` : "No verdicts yet."),
    ),
    block("Does the side decide?", ...side(position)),
    block("Verdicts", split(all.verdicts)),
    block("People", raters(all.raters)),
  ];
  if (all.skips.length) parts.push(block("Skipped because", make("ul", { class: "legend" }, ...all.skips.map((skip) => make("li", {}, `${skip.reason} (${number(skip.count)})`)))));
  if (progress.drafts || progress.failed) parts.push(block("Being prepared", make("p", {}, `${number(progress.drafts)} pairs wait for an answer of the model${progress.failed ? `; ${number(progress.failed)} could not be made` : ""}.`), ...(queue.failures?.length ? [make("ul", { class: "legend" }, ...queue.failures.map((failure) => make("li", {}, failure.reason)))] : [])));
  return parts;
}

function shelf(list, current) {
  if (!list.length) return [make("p", { class: "caption" }, "No queues")];
  return list.map((queue) => {
    const { progress } = queue;
    const done = progress.wanted ? progress.verdicts / progress.wanted : 0;
    const words = `${percent(done)} of ${number(progress.tasks)} pairs${queue.closed ? " · closed" : ""}`;
    return make("a", { href: `?${new URLSearchParams({ queue: queue.name })}`, "aria-current": String(queue === current) }, make("strong", {}, queue.name), make("progress", { max: 1, value: done, "aria-label": words }), make("small", {}, words));
  });
}

/** The queues and, of the one that the address names or else the first, what there is to know. */
export async function queues() {
  if (!session.operator) throw new Refused(403, "This key may label, but not see statistics: that takes one of scope train or admin.");
  const { data } = await call("GET", "/v1/labeling/queues");
  const wanted = new URLSearchParams(location.search).get("queue");
  const current = data.find((queue) => queue.name === wanted) ?? data[0];
  let parts = [make("header", {}, title("No queues yet"), make("p", { class: "lead" }, "POST /v1/labeling/queues makes one."))];
  if (current) {
    const path = `/v1/labeling/queues/${current.id}`;
    parts = panel(...(await Promise.all([call("GET", path), call("GET", `${path}/statistics`)])));
  }
  const board = make("div", { class: "board" }, make("nav", { class: "shelf card", "aria-label": "Queues" }, ...shelf(data, current)), make("div", { class: "panel" }, ...parts));
  return { title: "Labeling", body: make("div", {}, board) };
}
