// The table: columns, filters, sorting, the best figures, rows made as they are scrolled to.

const CHUNK = 80;
const scroller = document.getElementById("scroller");
const table = document.getElementById("runs");
const order = {column: undefined, down: false};
let filtered = data.runs;
let drawn = 0;

const word = name => ({name, title: name, get: run => run[name]});
// best: 1 where more is better, -1 where less is, 0 where neither; of: the corpus or task whose marks stand beside
const figure = (title, group, get, show, best, of) => ({
  name: `${group} ${title}`, title, group, get, show, best, of, number: true,
});

/** The columns of a figure: itself, and its difference to the untouched model where that is shown. */
function measured({title, group, source, scale, digits, better, change}, i) {
  const show = x => written(x, digits);
  const own = figure(title, group, run => scale * run.figures[i]?.[0], show, better, source);
  own.more = run => (run.figures[i][1] === null ? "" : ` ±${fixed(scale * run.figures[i][1], digits)}`);
  own.hint = run => (run.figures[i][2] === null ? "" : `${run.figures[i][3]}, ${run.figures[i][2]} documents`);
  const moved = run => scale * (run.figures[i]?.[0] - run.baseline[i]);
  return change ? [own, figure("Δ", group, moved, x => (x > 0 ? "+" : "") + show(x), better)] : [own];
}

const state = run => element("span", {className: `status ${run.status}`}, run.status);

const columns = [
  {name: "status", title: "status", get: run => run.status, cell: state},
  ...["model", "format", "transform", "solver"].map(word),
  word("settings"),
  ...data.columns.flatMap(measured),
  figure("bits", "cost", run => run.bits, x => fixed(x, 2)),
  figure("online %", "cost", run => known(run.online) ? 100 * run.online : null, x => fixed(x, 1)),
  figure("seconds", "cost", run => run.seconds, x => fixed(x, 0)),
  figure("peak MB", "cost", run => run.peak, x => fixed(x, 0)),
  {name: "run", title: "run", get: run => run.id, cell: run => element("code", {title: run.id}, run.short)},
].filter(column => column.group === "cost" || data.runs.some(run => known(column.get(run))));

columns.forEach((column, i) => {
  column.classes = [
    column.name === "settings" && "settings", // what tells runs of the same choices apart, on several lines if need be
    column.number && "number", // to the right
    column.group !== columns[i - 1]?.group && "edge", // where a group begins
    data.runs.some(run => run.marks[column.of]) && "marked", // room for letters
  ].filter(Boolean);
});
const figures = columns.filter(column => column.group);

function known(value) {
  return value !== undefined && value !== null && !Number.isNaN(value);
}

/** Best value of each judged column among the finished runs of each model: Map of "column model" to value. */
function bests() {
  const best = new Map();
  for (const column of figures.filter(column => column.best)) {
    for (const run of filtered) {
      const value = column.get(run), key = `${column.name} ${run.model}`;
      if (run.status === "done" && known(value) && !(column.best * value <= column.best * best.get(key))) best.set(key, value);
    }
  }
  return best;
}

function head() {
  const groupRow = element("tr", {className: "groups"}, element("td"));
  for (const column of columns) {
    if (column.group && !column.classes.includes("edge")) groupRow.lastChild.colSpan += 1;
    else if (!column.group) groupRow.append(element("td"));
    else groupRow.append(element("th", {scope: "colgroup", className: "edge"}, element("span", {}, column.group)));
  }
  const headers = columns.map(column => {
    const button = element("button", {type: "button", onclick: () => sort(column)}, column.title);
    return (column.header = element("th", {scope: "col", className: column.classes.join(" ")}, button));
  });
  const check = element("td", {}, element("span", {className: "unseen"}, "compare"));
  const copy = element("td", {}, element("span", {className: "unseen"}, "command"));
  groupRow.append(element("td"));
  table.append(element("thead", {}, groupRow, element("tr", {}, check, ...headers, copy)), element("tbody"));
}

function sort(column) {
  order.down = order.column === column && !order.down;
  order.column = column;
  for (const {header} of columns) header.removeAttribute("aria-sort");
  column.header.setAttribute("aria-sort", order.down ? "descending" : "ascending");
  arrange();
}

/** Rows without a value stand last, whichever the direction. */
function compare(a, b) {
  const [x, y] = [order.column.get(a), order.column.get(b)];
  if (!known(x) || !known(y)) return known(y) - known(x);
  return (order.down ? -1 : 1) * (typeof x === "string" ? x.localeCompare(y, "en", {numeric: true}) : x - y);
}

function cell(run, column, best) {
  const value = column.get(run);
  const made = element("td", {className: column.classes.join(" ")});
  if (!known(value)) return made;
  made.append(column.cell ? column.cell(run) : column.show ? column.show(value) : value);
  if (column.best && run.status === "done" && best.get(`${column.name} ${run.model}`) === value) made.classList.add("best");
  const more = column.more?.(run);
  if (more) made.append(element("small", {}, more));
  if (column.hint) made.title = column.hint(run);
  const marks = (run.marks[column.of] ?? []).map(index => data.marks[index]);
  if (marks.length) {
    const letters = [...new Set(marks.map(([letter]) => letter))].join("");
    made.append(element("sup", {title: marks.map(([, text]) => text).join("; ")}, letters));
  }
  return made;
}

function line(run, best) {
  const box = element("input", {type: "checkbox", checked: checked.has(run.id), "aria-label": `Compare ${run.label}`});
  box.onchange = () => check(run, box.checked);
  const copy = element("button", {type: "button", className: "copy", "aria-label": `Copy command of ${run.label}`}, "copy");
  [copy.disabled, copy.title] = [!run.command, run.command ?? "no command stored"];
  copy.onclick = () => copyCommand(run, copy);
  // What happened to an unfinished run stands where its figures would.
  const said = run.status === "done" ? undefined : (run.error ?? (run.stage && `at ${run.stage}`));
  const told = said && element("td", {colSpan: figures.length, className: "said edge", title: said}, element("div", {}, said));
  const shown = told ? columns.filter(column => !column.group || column === figures[0]) : columns;
  const cells = shown.map(column => (told && column.group ? told : cell(run, column, best)));
  return element("tr", {className: run.status}, element("td", {}, box), ...cells, element("td", {}, copy));
}

function more() {
  const best = (more.best ??= bests());
  table.tBodies[0].append(...filtered.slice(drawn, drawn + CHUNK).map(run => line(run, best)));
  drawn = Math.min(drawn + CHUNK, filtered.length);
}

/** Draw the table anew from the filters and the order. */
function arrange() {
  const chosen = groups.map((group, i) => [group, filters.selects[i].value]).filter(([, value]) => value);
  const words = filters.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = run => chosen.every(([group, value]) => run[group] === value) && words.every(part => run.text.includes(part));
  filtered = data.runs.filter(fits);
  if (order.column) filtered = [...filtered].sort(compare);
  table.tBodies[0].replaceChildren();
  [drawn, more.best, scroller.scrollTop] = [0, undefined, 0];
  more();
  filters.count.textContent = `${filtered.length.toLocaleString("en")} of ${data.runs.length.toLocaleString("en")}`;
}

const filters = (() => {
  const form = document.getElementById("filters");
  const text = element("input", {type: "search", placeholder: "words of a name, command or error", oninput: refilter});
  const choices = groups.map(group => choice(group, values(data.runs, group), refilter, "all"));
  const count = element("output");
  form.append(element("label", {className: "text"}, element("span", {}, "filter"), text), ...choices, count);
  form.onsubmit = () => false;
  return {text, count, selects: choices.map(label => label.lastChild)};
})();

function refilter() {
  arrange();
  redraw("scatter", "heat", "activations");
}

function check(run, on) {
  on ? checked.add(run.id) : checked.delete(run.id);
  const [output, clear] = document.getElementById("chosen").children;
  output.textContent = `${checked.size} checked`;
  clear.disabled = !checked.size;
  redraw("curves", "diff", "texts", "activations");
}

function uncheck() {
  for (const id of [...checked]) check(byId.get(id), false);
  for (const box of table.querySelectorAll("input:checked")) box.checked = false;
}

async function copyCommand(run, button) {
  const done = (await toClipboard(run.command)) ? "copied" : "failed";
  document.getElementById("said").textContent = `command ${done}`;
  button.textContent = done;
  setTimeout(() => (button.textContent = "copy"), 1500);
}

/** Whether it worked. Browsers that keep the clipboard from pages on a disk still copy what is selected. */
async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const held = document.activeElement;
    const area = element("textarea", {value: text, className: "unseen"});
    document.body.append(area);
    area.select();
    const worked = document.execCommand("copy");
    area.remove();
    held?.focus();
    return worked;
  }
}
