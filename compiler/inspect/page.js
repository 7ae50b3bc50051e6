// The page: a header, the list of passes on the left, and the changes or the graph of the selected pass.

const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["attention", "linear", "norm", "rope", "embedding", "activation", "arithmetic", "view"];
const state = { step: data.steps.length - 1, tab: "graph", q: "" };

// Create an element: make("div.class", {attribute: value}, children...). Text is never parsed as markup.
function make(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  return fill(document.createElement(tag), classes, attributes, children);
}

function svg(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), classes, attributes, children);
}

function fill(element, classes, attributes, children) {
  if (classes.length) element.classList.add(...classes);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

const count = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : one.endsWith("ss") || one.endsWith("ch") ? "es" : "s"}`;

// Header ------------------------------------------------------------------------------------------------------------

function drawHeader() {
  const search = make("input", {
    type: "search", placeholder: "op, weight, node or module", title: "Press Enter for the next hit", "aria-label": "Search", value: state.q,
    onkeydown: (event) => { if (event.key === "Enter") goToHit(); },
    oninput: (event) => { state.q = event.target.value.trim(); lastHit = -1; show(); },
  });
  const found = make("span.soft", { id: "found", "aria-live": "polite" });
  const stages = ["captured", "canonical", "optimized"].map((stage) => {
    const at = data.steps.findIndex((step) => step.stage === stage);
    return at < 0 ? make("span.stage", {}, stage) : make("button.stage", { onclick: () => go({ step: at, tab: "graph" }), title: "Show the program at this stage" }, stage);
  });
  const facts = [["", data.dtype], ["", count(data.parameters, "parameter")], ["", count(data.layers, "layer")],
    ["up to ", `${data.max_seq_len.toLocaleString("en")} positions`], ["", count(data.steps[0].nodes, "node") + " captured"],
    ["now ", count(data.steps.at(-1).nodes, "node")], ["", `llmc ${data.llmc}`]];
  document.title = `${data.model} · llmc`;
  document.getElementById("header").append(...[
    make("div.head", {}, make("h1", {}, data.model), ...stages, make("div.search", {}, found, search)),
    make("div.facts", {}, facts.map(([before, fact]) => make("span", {}, before, make("b", {}, fact)))),
    data.refusal ? make("div.refusal", {}, make("b", {}, data.refusal.code), ` ${data.refusal.what} ${data.refusal.hint}`) : null,
    make("details", {}, make("summary", {}, "Ops by stage"), make("div.opscroll", {}, opsTable())),
  ].filter(Boolean));
}

function opsTable() {
  const moments = data.steps.filter((step, at) => at === 0 || step.stage !== data.steps[at - 1].stage || at === data.steps.length - 1);
  const total = (op) => moments.map((step) => step.ops[op] ?? 0);
  const names = [...new Set(moments.flatMap((step) => Object.keys(step.ops)))].sort();
  const order = (op) => (op.startsWith("llmc.") ? 0 : 1);
  names.sort((a, b) => order(a) - order(b) || total(b)[0] - total(a)[0]);
  return make("table.ops", {},
    make("tr", {}, make("th", {}, "op"), moments.map((step) => make("th", {}, step.name.startsWith("Reach(") ? step.stage : step.name))),
    names.map((op) => make("tr", {}, make("td", {}, make("code", {}, op)), total(op).map((n) => make("td", {}, n ? String(n) : "·")))));
}

// Passes ------------------------------------------------------------------------------------------------------------

function drawTimeline() {
  const most = Math.max(...data.steps.map((step) => step.nodes));
  document.getElementById("timeline").replaceChildren(...data.steps.map((step, at) => {
    const mark = at === 0 || step.name.startsWith("Reach(");
    const missed = step.misses.reduce((sum, miss) => sum + miss.count, 0);
    return make(`button.step${mark ? ".mark" : step.matches ? ".did" : ""}`, { onclick: () => go({ step: at }), "aria-current": String(at === state.step) },
      make("span.dot"), make("span.name", {}, step.name),
      make("span.count", { title: `${count(step.matches, "match")}, ${count(missed, "miss")}` }, step.matches ? `×${step.matches}` : "", missed ? make("i", {}, `${missed}?`) : null),
      make("span.bar", {}, make("div", { style: `width:${(110 * step.nodes) / most}px` }), `${step.nodes}`));
  }));
}

function go(change) {
  Object.assign(state, change);
  show();
  if ("step" in change) window.scrollTo({ top: 0 });
}

function show() {
  history.replaceState(null, "", "#" + new URLSearchParams(state));
  const step = data.steps[state.step];
  drawTimeline();
  const missed = step.misses.reduce((sum, miss) => sum + miss.count, 0);
  const numbers = state.step ? [count(step.matches, "match"), count(missed, "miss"), `${step.ms.toFixed(0)} ms`, `${data.steps[state.step - 1].nodes} → ${step.nodes} nodes`] : [`${step.nodes} nodes`];
  const tab = (name, text) => make("button", { role: "tab", "aria-selected": String(state.tab === name), onclick: () => go({ tab: name }) }, text);
  const sections = state.tab === "changes" ? changes(step) : graphs(step);
  document.getElementById("main").replaceChildren(
    make("div.title", {}, make("h2", {}, step.name), make("span.soft", {}, `${step.stage} · ${numbers.join(" · ")}`)),
    step.about ? make("p.about.mono", {}, step.about) : "",
    missed ? misses(step) : "",
    make("div.tabs", { role: "tablist" }, tab("graph", "Graph"), tab("changes", "Changes"),
      state.tab === "graph" ? make("div.legend", {}, KINDS.map((kind) => make("span", { style: `--k:var(--${kind})` }, kind)), make("i", {}, "filled: op of llmc's dialect")) : null),
    ...sections);
  const hits = document.querySelectorAll("main .hit, main .line-hit").length;
  document.getElementById("found").textContent = state.q ? count(hits, "hit") : "";
}

function misses(step) {
  return make("details.misses", { open: step.matches === 0 }, make("summary", {}, "Left alone"), make("ul", {}, step.misses.map((miss) =>
    make("li", {}, `${miss.count}× ${miss.reason} `, make("span.soft.mono", {}, miss.at.join(", ") + (miss.count > miss.at.length ? " …" : ""))))));
}

// Searching -----------------------------------------------------------------------------------------------------------

// Search a folded section under the names of all its layers, not only of the layer that is shown.
function matches(section, text) {
  if (!state.q) return false;
  const wanted = state.q.toLowerCase();
  const stem = section.layers[0];
  const names = /\d/.test(wanted) && stem ? section.layers : [stem];
  return names.some((name) => (stem ? text.replaceAll("*.", name + ".").replaceAll(stem + ".", name + ".") : text).toLowerCase().includes(wanted));
}

let lastHit = -1;

function goToHit() {
  const hits = document.querySelectorAll("main .hit, main .line-hit");
  if (!hits.length) return;
  lastHit = (lastHit + 1) % hits.length;
  hits[lastHit].scrollIntoView({ block: "center", inline: "center" });
}

const boxText = (box) => [box.op, box.name, box.where, box.value, ...box.weights].join("\n");

// Changes -------------------------------------------------------------------------------------------------------------

const lines = (view) => (view == null || data.views[view].text === "" ? [] : data.views[view].text.split("\n"));

function changes(step) {
  const before = state.step ? data.steps[state.step - 1] : null;
  const same = [], out = [];
  data.sections.forEach((section, at) => {
    if (before && before.views[at] === step.views[at] && !lines(step.views[at]).some((line) => matches(section, line))) {
      same.push(section.name);
      return;
    }
    const rows = before ? diffLines(lines(before.views[at]), lines(step.views[at])) : lines(step.views[at]).map((line) => [line, line]);
    const hit = rows.some((row) => row.some((line) => line && matches(section, line)));
    out.push(sectionOf(section, hit || out.length < 2, [
      before ? make("span.plus", {}, `+${rows.filter(([a, b]) => b !== null && a !== b).length}`) : null,
      before ? make("span.minus", {}, `−${rows.filter(([a, b]) => a !== null && a !== b).length}`) : null,
    ], () => (before ? sideBySide(section, rows) : make("div.code", {}, rows.map(([line]) => codeLine(section, line))))));
  });
  if (same.length) out.push(make("p.soft", {}, `Unchanged: ${same.join("; ")}.`));
  return out;
}

function sideBySide(section, rows) {
  const grid = make("div.diff", {}, make("div.headrow", {}, state.step > 1 ? `after ${data.steps[state.step - 1].name}` : "captured"), make("div.headrow", {}, `after ${data.steps[state.step].name}`));
  for (const row of foldRows(rows, 3)) {
    if (!row.folded) grid.append(...pair(section, row));
    else if (row.folded.length < 4 || row.folded.some(([line]) => matches(section, line))) grid.append(...row.folded.flatMap((one) => pair(section, one)));
    else grid.append(make("button.more", { onclick: (event) => event.target.replaceWith(...row.folded.flatMap((one) => pair(section, one))) }, `… ${row.folded.length} unchanged lines`));
  }
  return grid;
}

function pair(section, [a, b]) {
  const side = (line, kind) => (line === null ? make("div.none") : codeLine(section, line, a === b ? "" : kind));
  return [side(a, ".gone"), side(b, ".add")];
}

const TOKENS = /(#.*$|  # .*$)|(llmc\.\w+)|(aten\.[\w.]+)|(weights\["[^"]*"\])/g;

function codeLine(section, line, kind = "") {
  const parts = [];
  let from = 0;
  for (const token of line.matchAll(TOKENS)) {
    parts.push(line.slice(from, token.index));
    const sort = ["note", "own", "aten", "weight"][token.slice(1).findIndex((group) => group !== undefined)];
    parts.push(make(`span.t-${sort}`, {}, token[0]));
    from = token.index + token[0].length;
  }
  parts.push(line.slice(from));
  return make(`div${kind}${matches(section, line) ? ".line-hit" : ""}`, {}, parts);
}

// Sections ------------------------------------------------------------------------------------------------------------

// Build the body when the section is first opened, so that a page with many layers loads fast.
function sectionOf(section, open, notes, body) {
  const many = section.layers.length;
  const element = make("details.section", { open }, make("summary", {}, make("b", {}, section.name),
    many > 1 ? make("span.soft", {}, `${many} identical layers`) : null, notes,
    section.layers[0] ? make("span.star", {}, `* stands for ${many > 1 ? "each layer name; shown: " : ""}${section.layers[0]}`) : null));
  const build = () => { if (element.open && element.children.length === 1) element.append(body()); };
  element.addEventListener("toggle", build);
  build();
  return element;
}

function graphs(step) {
  return data.sections.map((section, at) => {
    if (step.views[at] == null) return "";
    const boxes = data.views[step.views[at]].boxes;
    const hits = boxes.map((box) => matches(section, boxText(box)));
    const calls = boxes.filter((box) => box.kind !== "input" && box.kind !== "layers").length;
    const open = state.q ? hits.some(Boolean) : boxes.length < 400 && (at < 2 || data.sections.length < 4);
    return sectionOf(section, open, [make("span.soft", {}, count(calls, "op"))], () => make("div.canvas", {}, drawGraph(section, boxes, hits)));
  });
}

function drawGraph(section, boxes, hits) {
  const stem = section.layers[0] ? section.layers[0] + "." : "";
  const texts = boxes.map((box) => boxLines(box, stem));
  const sized = boxes.map((box, at) => ({
    inputs: box.inputs, external: box.kind === "input",
    width: Math.max(...texts[at].map(([kind, text]) => 22 + text.length * (kind === "op" ? 7.6 : 6.4)), 60), height: 12 + 15 * texts[at].length,
  }));
  const plan = layout(sized);
  const drawing = svg(`svg${state.q ? ".searching" : ""}`, { width: plan.width, height: plan.height, viewBox: `0 0 ${plan.width} ${plan.height}`, role: "img", "aria-label": `Dataflow of ${section.name}` });
  const edges = plan.edges.map(({ from, to, points }) => {
    const ends = [...points];
    ends[0] = [points[0][0], points[0][1] + sized[from].height / 2];
    ends[ends.length - 1] = [points.at(-1)[0], points.at(-1)[1] - sized[to].height / 2];
    const path = ends.map(([x, y], i) => {
      if (!i) return `M${x},${y}`;
      const [x0, y0] = ends[i - 1], half = (y - y0) / 2;
      return `C${x0},${y0 + half} ${x},${y - half} ${x},${y}`;
    });
    return { from, to, element: svg("path.edge", { d: path.join("") }) };
  });
  drawing.append(...edges.map((edge) => edge.element));
  boxes.forEach((box, at) => {
    const { x, y } = plan.at[at], { width, height } = sized[at];
    const light = (on) => {
      for (const edge of edges) if (edge.from === at || edge.to === at) edge.element.classList.toggle("lit", on);
    };
    drawing.append(svg(`g.box.k-${box.kind}${box.dialect ? ".own" : ""}${hits[at] ? ".hit" : ""}`, {
      style: `--k:var(--${box.kind})`, transform: `translate(${x - width / 2},${y - height / 2})`, tabindex: "0",
      onmouseenter: (event) => { light(true); card(box, stem, event); }, onmouseleave: () => { light(false); card(null); },
      onfocus: (event) => { light(true); card(box, stem, event); }, onblur: () => { light(false); card(null); },
    }, svg("rect", { width, height, rx: box.kind === "layers" ? 12 : 6 }),
    texts[at].map(([kind, text], i) => svg(`text.${kind}`, { x: width / 2, y: 18 + 15 * i, "text-anchor": "middle" }, text))));
  });
  return drawing;
}

function boxLines(box, stem) {
  if (box.kind === "layers") return [["op", count(data.layers, "layer")], ["value", data.sections.slice(1).map((section) => section.name).join("; ").slice(0, 60)]];
  const shown = [["op", box.op.replace(/^(llmc|aten)\./, "")]];
  if (box.kind === "input" && box.text) shown[0][1] = `from ${shown[0][1]}`;
  if (box.value) shown.push(["value", box.value]);
  for (const weight of box.weights) shown.push(["weight", weight.startsWith(stem) ? weight.slice(stem.length).split(".").slice(-2).join(".") : weight]);
  if (box.leaves) shown.push(["out", stem ? "▾ layer output" : "▾ logits"]);
  return shown;
}

function card(box, stem, event) {
  const element = document.getElementById("card");
  element.hidden = !box || box.kind === "layers";
  if (element.hidden) return;
  const rows = [["module", box.where || "the program"], ["value", box.value], ...box.weights.map((weight) => ["weight", weight])].filter(([, text]) => text);
  element.replaceChildren(make("div.mono", {}, box.text || box.name), make("dl", {}, rows.flatMap(([name, text]) => [make("dt", {}, name), make("dd.mono", {}, text)])));
  const near = event.currentTarget.getBoundingClientRect(), size = element.getBoundingClientRect();
  const below = near.bottom + size.height + 14 < innerHeight;
  element.style.left = `${Math.max(8, Math.min(near.left, innerWidth - size.width - 12))}px`;
  element.style.top = `${below ? near.bottom + 8 : Math.max(8, near.top - size.height - 8)}px`;
}

// Start -----------------------------------------------------------------------------------------------------------------

// The URL's fragment selects what is shown: #step=7&tab=changes&q=rope.
const fragment = new URLSearchParams(location.hash.slice(1));
if (data.steps[fragment.get("step")]) state.step = Number(fragment.get("step"));
if (fragment.get("tab") === "changes") state.tab = "changes";
state.q = fragment.get("q") ?? "";
drawHeader();
show();
