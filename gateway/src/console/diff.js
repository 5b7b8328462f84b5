// Where two texts differ, word by word. Myers, "An O(ND) Difference Algorithm and Its Variations" (1986), greedy form.

const WORDS = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;
/** Beyond this many differing words a diff tells nothing, and would take long: all between the common ends counts as different. */
const MOST_EDITS = 1500;

/** For both texts, their pieces in order: `{text, only}`, where `only` says that the other text lacks the piece. */
export function wordDiff(left, right) {
  const a = left.match(WORDS) ?? [];
  const b = right.match(WORDS) ?? [];
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head += 1;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a.at(-1 - tail) === b.at(-1 - tail)) tail += 1;
  const middle = common(a.slice(head, a.length - tail), b.slice(head, b.length - tail));
  const keep = (words, inMiddle) => words.map((_, at) => at < head || at >= words.length - tail || inMiddle.has(at - head));
  return [pieces(a, keep(a, middle.a)), pieces(b, keep(b, middle.b))];
}

/** Positions of a longest common subsequence, in both lists. */
function common(a, b) {
  const found = { a: new Set(), b: new Set() };
  const most = Math.min(MOST_EDITS, a.length + b.length);
  const zero = most + 1;
  // furthest[zero + k]: how far into `a` the best path on diagonal k reaches.
  const furthest = new Int32Array(2 * zero + 1);
  const trace = [];
  for (let d = 0; d <= most; d += 1) {
    trace.push(furthest.slice(zero - d - 1, zero + d + 2));
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d || (k !== d && furthest[zero + k - 1] < furthest[zero + k + 1]);
      let x = down ? furthest[zero + k + 1] : furthest[zero + k - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x += 1;
      furthest[zero + k] = x;
      if (x >= a.length && x - k >= b.length) {
        walkBack(trace, a.length, b.length, found);
        return found;
      }
    }
  }
  return found;
}

function walkBack(trace, lengthA, lengthB, found) {
  let x = lengthA;
  let y = lengthB;
  for (let d = trace.length - 1; d >= 0; d -= 1) {
    const before = (k) => trace[d][d + 1 + k];
    const k = x - y;
    const down = k === -d || (k !== d && before(k - 1) < before(k + 1));
    const from = down ? k + 1 : k - 1;
    const fromX = d === 0 ? 0 : before(from);
    const fromY = d === 0 ? 0 : fromX - from;
    while (x > fromX && y > fromY) {
      x -= 1;
      y -= 1;
      found.a.add(x);
      found.b.add(y);
    }
    x = fromX;
    y = fromY;
  }
}

function pieces(words, kept) {
  const joined = [];
  words.forEach((text, at) => {
    const last = joined.at(-1);
    // A space between two changed words is part of the change: fewer, longer marks read better.
    const only = !kept[at] || (/^\s+$/.test(text) && !text.includes("\n") && at > 0 && at + 1 < words.length && !kept[at - 1] && !kept[at + 1]);
    if (last && last.only === only) last.text += text;
    else joined.push({ text, only });
  });
  return joined;
}
