// Line diff of two texts, as rows [left, right]. In a row, null means that this side has no line.

// Above this number of table cells, every line between the common start and the common end counts as changed.
const MAX_CELLS = 9e6;

function diffLines(before, after) {
  let start = 0, end = 0;
  while (start < before.length && start < after.length && before[start] === after[start]) start++;
  const room = Math.min(before.length, after.length) - start;
  while (end < room && before[before.length - 1 - end] === after[after.length - 1 - end]) end++;
  const rows = before.slice(0, start).map((line) => [line, line]);
  rows.push(...diffMiddle(before.slice(start, before.length - end), after.slice(start, after.length - end)));
  rows.push(...before.slice(before.length - end).map((line) => [line, line]));
  return rows;
}

function diffMiddle(a, b) {
  if (a.length * b.length > MAX_CELLS) return pairUp(a, b);
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width); // length of the longest common subsequence of a[i:] and b[j:]
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const rows = [];
  let i = 0, j = 0, gone = [], added = [];
  const flush = () => { rows.push(...pairUp(gone, added)); gone = []; added = []; };
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { flush(); rows.push([a[i], b[j]]); i++; j++; }
    else if (j === b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) gone.push(a[i++]);
    else added.push(b[j++]);
  }
  flush();
  return rows;
}

function pairUp(a, b) {
  return Array.from({ length: Math.max(a.length, b.length) }, (_, i) => [a[i] ?? null, b[i] ?? null]);
}

// Replace each run of rows that are more than `keep` rows away from a change by {folded: rows}.
function foldRows(rows, keep) {
  const near = new Uint8Array(rows.length);
  rows.forEach(([a, b], at) => {
    if (a !== b) near.fill(1, Math.max(0, at - keep), at + keep + 1);
  });
  const out = [];
  rows.forEach((row, at) => {
    if (near[at]) out.push(row);
    else if (at && !near[at - 1]) out.at(-1).folded.push(row);
    else out.push({ folded: [row] });
  });
  return out;
}
