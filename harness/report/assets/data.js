// What Python embedded, and how its numbers are written.

const data = JSON.parse(document.getElementById("data").textContent);
const groups = ["model", "data", "format", "transform", "solver", "status", "sweep"];
const checked = new Set(); // ids of runs, in the order in which they were checked
const narrow = matchMedia("(max-width: 40rem)"); // a phone
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

for (const run of data.runs) {
  for (const field of ["figures", "baseline", "marks", "curves"]) run[field] ??= {};
  run.ppl = {}; // what the plots are of
  for (const [index, [value]] of Object.entries(run.figures)) {
    const {evaluation, source} = data.columns[index];
    if (evaluation === "ppl") run.ppl[source] = value;
  }
  run.short = run.id.slice(-10);
  run.label = [run.format, run.transform, run.solver, cut(run.settings ?? "", 40), run.short].filter(Boolean).join(" · ");
  const words = [run.id, ...groups.map(group => run[group]), run.settings, run.command, run.error];
  run.text = words.join(" ").toLowerCase();
}
const byId = new Map(data.runs.map(run => [run.id, run]));
const names = field => [...new Set(data.runs.flatMap(run => Object.keys(run[field])))];
const corpora = names("ppl");

const minus = text => text.replace("-", "−");
const fixed = (x, digits) =>
  minus(x.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits}));
const written = (x, digits) => (Math.abs(x) < 1e4 ? fixed(x, digits) : minus(x.toExponential(1).replace("e+", "e")));
const perplexity = x => written(x, 2);
const brief = x => (x === undefined ? "–" : minus(Math.abs(x) < 1e5 ? String(+x.toPrecision(3)) : x.toExponential(1)));

/** An element with properties, attributes (any name with a dash, or `role`, `scope`) and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter(child => child !== undefined));
  return made;
}

/** A labelled select; `changed` is called with nothing when another option is chosen. */
function choice(label, options, changed, all) {
  const select = element("select", {onchange: changed});
  const labelled = element("label", {}, element("span", {}, label), select);
  refill(select, options, all);
  return labelled;
}

/** Give a select other options; what was chosen stays chosen where it still exists. */
function refill(select, options, all) {
  const before = select.value;
  const entries = options.map(option => (Array.isArray(option) ? option : [option, option]));
  if (all !== undefined) entries.unshift(["", all]);
  select.replaceChildren(...entries.map(([value, text]) => element("option", {value, textContent: text})));
  if (entries.some(([value]) => value === before)) select.value = before;
  select.disabled = entries.length < 2;
  select.parentElement.hidden = !entries.length;
}

const values = (rows, field) => [...new Set(rows.map(run => run[field]).filter(Boolean))].sort();

/** The settings of a run, Map of dotted key to text; undefined where none are stored. */
function settings(run) {
  if (!run.config) return undefined;
  const held = new Set(data.base);
  for (const index of run.config) held.has(index) ? held.delete(index) : held.add(index);
  return new Map([...held].map(index => data.settings[index]));
}
