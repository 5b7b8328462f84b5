// Markdown to DOM nodes. Text of models reaches the page only as text nodes: there is no HTML string anywhere, so nothing in an
// answer can become markup of ours. Links lead to http and https only; images are links, so that opening a task fetches nothing.

const DEEPEST = 12;

/** Nodes for a text in Markdown. */
export function markdown(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

function element(name, parent, text) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+([^]*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+([^]*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DELIMITER = /^\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?$/;

function blocks(lines, parent, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (line.trim() === "") {
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      const close = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`);
      const body = [];
      at += 1;
      while (at < lines.length && !close.test(lines[at])) body.push(lines[at++]);
      at += 1;
      element("code", element("pre", parent), body.join("\n"));
    } else if ((match = HEADING.exec(line))) {
      // The page has its own first and second level.
      inline(closed(match[2]), element(`h${Math.min(6, match[1].length + 2)}`, parent), 0);
      at += 1;
    } else if (RULE.test(line)) {
      element("hr", parent);
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const inner = [];
      while (at < lines.length && (match = QUOTE.exec(lines[at]))) {
        inner.push(match[1]);
        at += 1;
      }
      blocks(inner, element("blockquote", parent), depth + 1);
    } else if (ITEM.test(line) && depth < DEEPEST) {
      at = list(lines, at, parent, depth);
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DELIMITER.test(lines[at + 1].trim())) {
      at = table(lines, at, parent);
    } else {
      const paragraph = [line];
      at += 1;
      while (at < lines.length && lines[at].trim() !== "" && !starts(lines[at])) paragraph.push(lines[at++]);
      inline(paragraph.map((part) => part.trimStart()).join("\n"), element("p", parent), 0);
    }
  }
}

/** A heading's text without the number signs that may close it. By hand: a pattern would try every space of a long run. */
function closed(heading) {
  const text = heading.trimEnd();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

/** Whether a line ends the paragraph before it. A number does so only when it is 1: "in\n1984." is prose. */
function starts(line) {
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || (item && !/^\d/.test(item[2])) || (item && /^1[.)]/.test(item[2]));
}

function list(lines, from, parent, depth) {
  const first = ITEM.exec(lines[from]);
  const ordered = /^\d/.test(first[2]);
  const node = element(ordered ? "ol" : "ul", parent);
  if (ordered) node.start = Number.parseInt(first[2], 10);
  const indent = first[1].length;
  let at = from;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length < indent || match[1].length > indent + 3 || /^\d/.test(match[2]) !== ordered) break;
    const inside = lines[at].length - match[3].length;
    const body = [match[3]];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const lead = line.length - line.trimStart().length;
      if (line.trim() === "") {
        const next = lines[at + 1];
        if (next === undefined || next.trim() === "" || next.length - next.trimStart().length <= indent) break;
      } else if (lead <= indent && (ITEM.test(line) || starts(line))) {
        break;
      } else if (lead <= indent && lines[at - 1].trim() === "") {
        break;
      }
      body.push(line.slice(Math.min(lead, inside)));
      at += 1;
    }
    const item = element("li", node);
    blocks(body, item, depth + 1);
    // A tight item is its text, without a paragraph around it.
    const only = item.firstElementChild;
    if (only && only.tagName === "P") only.replaceWith(...only.childNodes);
    let blank = at;
    while (blank < lines.length && lines[blank].trim() === "") blank += 1;
    const next = blank < lines.length ? ITEM.exec(lines[blank]) : null;
    if (next && next[1].length >= indent && next[1].length <= indent + 3 && /^\d/.test(next[2]) === ordered) at = blank;
  }
  return at;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, from, parent) {
  const node = element("table", parent);
  const head = element("tr", element("thead", node));
  const columns = cells(lines[from]);
  for (const cell of columns) inline(cell, element("th", head), 0);
  const body = element("tbody", node);
  let at = from + 2;
  while (at < lines.length && lines[at].includes("|")) {
    const row = element("tr", body);
    for (const cell of cells(lines[at]).slice(0, columns.length)) inline(cell, element("td", row), 0);
    at += 1;
  }
  return at;
}

// Lengths are bounded: an answer full of openings without an end must not make the page stand still.
const INLINE = new RegExp(
  [
    /\\([\\`*_{}[\]()#+\-.!|~<>])/, // 1: escaped
    /(`+)([^`]|[^`][^]{0,4000}?[^`])\2(?!`)/, // 2, 3: code
    /!?\[([^\]\n]{0,500})\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"\n]*")?\s*\)/, // 4, 5: link, image
    /\*\*(?=\S)([^]{0,4000}?\S)\*\*/, // 6: strong
    /(?<![\w_])__(?=\S)([^]{0,4000}?\S)__(?!\w)/, // 7: strong
    /\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)/, // 8: emphasis
    /(?<![\w_])_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/, // 9: emphasis
    /~~(?=\S)([^~]*?\S)~~/, // 10: struck
    /<?(https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_~])>?/, // 11: address
    /(?<! ) {2,}\n|\\?\n/, // line break
  ].map((part) => part.source).join("|"),
  "gu",
);

function inline(text, parent, depth) {
  if (depth > DEEPEST) {
    parent.append(text);
    return;
  }
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    parent.append(text.slice(last, match.index));
    last = match.index + match[0].length;
    const [whole, escaped, , code, label, target, strong, strong2, soft, soft2, struck, address] = match;
    if (escaped !== undefined) parent.append(escaped);
    else if (code !== undefined) element("code", parent, code.replace(/^ (.*\S.*) $/s, "$1").replaceAll("\n", " "));
    else if (label !== undefined) link(label || target, target, parent, depth, whole);
    else if (strong !== undefined || strong2 !== undefined) inline(strong ?? strong2, element("strong", parent), depth + 1);
    else if (soft !== undefined || soft2 !== undefined) inline(soft ?? soft2, element("em", parent), depth + 1);
    else if (struck !== undefined) inline(struck, element("s", parent), depth + 1);
    else if (address !== undefined) link(address, address, parent, DEEPEST, address);
    else element("br", parent);
  }
  parent.append(text.slice(last));
}

/** A link where the address is http or https; otherwise the text as it was written. */
function link(label, target, parent, depth, whole) {
  let url;
  try {
    url = new URL(target);
  } catch {
    url = null;
  }
  if (!url || (url.protocol !== "http:" && url.protocol !== "https:")) {
    parent.append(whole);
    return;
  }
  const node = element("a", parent);
  node.href = url.href;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  node.title = url.href;
  // Links inside links do not exist.
  if (depth >= DEEPEST || /https?:|\]\(/.test(label)) node.textContent = label;
  else inline(label, node, depth + 1);
}
