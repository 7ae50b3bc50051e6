// Layered layout of a dataflow graph: ranks from top to bottom, few edge crossings, straight long edges.

const GAP_X = 26, GAP_Y = 34, LINE_WIDTH = 14;

// boxes: [{inputs: [index], width, height, external}]. The inputs of a box come before it in the list. An external box
// is a value from outside the section.
// Returns {width, height, at: [{x, y}] (centers), edges: [{from, to, points: [[x, y]]}]}.
function layout(boxes) {
  const nodes = boxes.map((box) => ({ width: box.width, height: box.height, up: [], down: [] }));
  rank(boxes, nodes);
  const edges = [];
  const all = [...nodes];
  boxes.forEach((box, to) => box.inputs.forEach((from) => {
    const chain = [nodes[from]];
    for (let r = nodes[from].rank + 1; r < nodes[to].rank; r++) {
      const bend = { rank: r, width: LINE_WIDTH, height: 0, up: [], down: [], bend: true };
      all.push(bend);
      chain.push(bend);
    }
    chain.push(nodes[to]);
    for (let i = 1; i < chain.length; i++) { chain[i - 1].down.push(chain[i]); chain[i].up.push(chain[i - 1]); }
    edges.push({ from, to, chain });
  }));
  const ranks = [];
  for (const node of all) (ranks[node.rank] ??= []).push(node);
  order(ranks);
  spread(ranks);
  for (const { chain } of edges) straighten(chain.filter((node) => node.bend), ranks);
  let y = GAP_Y;
  for (const row of ranks) {
    const height = Math.max(...row.map((node) => node.height));
    for (const node of row) node.y = y + height / 2;
    y += height + GAP_Y;
  }
  const left = Math.min(...all.map((node) => node.x - node.width / 2)) - GAP_X;
  for (const node of all) node.x -= left;
  return {
    width: Math.max(...all.map((node) => node.x + node.width / 2)) + GAP_X,
    height: y,
    at: nodes.map(({ x, y }) => ({ x, y })),
    edges: edges.map(({ from, to, chain }) => ({ from, to, points: chain.map((node) => [node.x, node.y]) })),
  };
}

// A box is below all its inputs. External boxes, and boxes that depend only on weights, are directly above their first
// user.
function rank(boxes, nodes) {
  boxes.forEach((box, at) => { nodes[at].rank = 1 + Math.max(-1, ...box.inputs.map((from) => nodes[from].rank)); });
  const onlyWeights = [], firstUser = nodes.map(() => Infinity);
  for (const box of boxes) onlyWeights.push(!box.external && box.inputs.every((from) => onlyWeights[from]));
  for (let at = boxes.length - 1; at >= 0; at--) {
    if ((onlyWeights[at] || boxes[at].external) && firstUser[at] !== Infinity) nodes[at].rank = firstUser[at] - 1;
    for (const from of boxes[at].inputs) firstUser[from] = Math.min(firstUser[from], nodes[at].rank);
  }
}

function order(ranks) {
  const number = (row) => row.forEach((node, index) => { node.index = index; });
  ranks.forEach(number);
  for (let sweep = 0; sweep < 12; sweep++) {
    const down = sweep % 2 === 0;
    for (const row of down ? ranks : [...ranks].reverse()) {
      for (const node of row) node.wish = mean((down ? node.up : node.down).map((other) => other.index), node.index);
      row.sort((a, b) => a.wish - b.wish);
      number(row);
    }
  }
}

// Move each rank in turn towards the mean position of its neighbours, keeping its order and without overlap.
function spread(ranks) {
  for (const row of ranks) {
    let x = 0;
    for (const node of row) { node.x = x + node.width / 2; x += node.width + GAP_X; }
    for (const node of row) node.x -= x / 2;
  }
  for (let sweep = 0; sweep < 60; sweep++) {
    const down = sweep % 2 === 0;
    for (const row of down ? ranks : [...ranks].reverse()) {
      for (const node of row) {
        const near = sweep < 12 ? (down ? node.up : node.down) : [...node.up, ...node.down];
        node.wish = mean(near.map((other) => other.x), node.x);
      }
      place(row);
    }
  }
}

// Find the positions nearest to the wished ones (least squares) that keep order and distance. Boxes that would overlap
// are merged into pools that move together.
function place(row) {
  let offset = 0;
  const pools = [];
  row.forEach((node, index) => {
    if (index) offset += (row[index - 1].width + node.width) / 2 + GAP_X;
    node.offset = offset;
    const weight = node.bend ? 4 : 1; // straight long edges are more important than centered boxes
    pools.push({ nodes: [node], sum: weight * (node.wish - offset), weight });
    while (pools.length > 1 && pools.at(-2).sum / pools.at(-2).weight > pools.at(-1).sum / pools.at(-1).weight) {
      const last = pools.pop(), into = pools.at(-1);
      into.nodes.push(...last.nodes);
      into.sum += last.sum;
      into.weight += last.weight;
    }
  });
  for (const pool of pools) for (const node of pool.nodes) node.x = pool.sum / pool.weight + node.offset;
}

// Make a long edge vertical if its neighbours leave room, at the free position that moves its bends least.
function straighten(bends, ranks) {
  const xs = bends.map((bend) => bend.x);
  const free = (bend, x) => [-1, 1].every((side) => {
    const next = ranks[bend.rank][bend.index + side];
    return !next || side * (next.x - x) >= (next.width + bend.width) / 2;
  });
  const moved = (x) => xs.reduce((sum, old) => sum + Math.abs(old - x), 0);
  const candidates = [...xs].sort((a, b) => moved(a) - moved(b)).filter((x) => bends.every((bend) => free(bend, x)));
  if (candidates.length) for (const bend of bends) bend.x = candidates[0];
}

function mean(values, otherwise) {
  return values.length ? values.reduce((a, b) => a + b, 0) / values.length : otherwise;
}
