// How the page starts: the table at once, Plotly and the plots once it is shown.

const waiting = new Set(Object.keys(draw));
let scheduled = 0;

/** Draw panels anew, soon: typing in the filter draws once it pauses. */
function redraw(...panels) {
  for (const panel of panels) waiting.add(panel);
  clearTimeout(scheduled);
  scheduled = setTimeout(() => {
    if (!window.Plotly) return;
    for (const panel of waiting) draw[panel]();
    waiting.clear();
  }, 120);
}

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to ${button.textContent.toLowerCase()} colours`);
  redraw(...Object.keys(draw));
}

/** Letters of the marks that occur, with what they stand for; of many texts of one letter, the first three. */
function legend() {
  const texts = new Map();
  for (const [letter, text] of data.marks) texts.set(letter, [...(texts.get(letter) ?? []), text]);
  const items = [...texts].map(([letter, list]) => {
    const told = list.slice(0, 3).join("; ") + (list.length > 3 ? `; and ${list.length - 3} more` : "");
    return element("span", {}, element("b", {}, letter), ` ${letter === "s" ? "subset: " : ""}${told}`);
  });
  const finished = data.runs.some(run => run.status === "done");
  const bold = element("span", {}, element("strong", {}, "bold"), " best of its model");
  document.getElementById("legend").append(...items, ...(finished ? [bold] : []));
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const number = status => fixed(data.runs.filter(run => run.status === status).length, 0);
  const states = values(data.runs, "status").map(status => `${number(status)} ${status}`);
  const updated = data.runs.map(run => run.updated ?? "").sort().pop();
  const facts = [...states, ...(updated ? [`as of ${updated.slice(0, 16).replace("T", " ")}`] : [])];
  document.getElementById("summary").textContent = facts.join(" · ") || "none stored yet";
  narrow.onchange = () => redraw("heat", "curves", "activations");
  dark.onchange = () => paint(dark.matches ? "dark" : "light");
  document.getElementById("theme").onclick = () => paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  document.querySelector("#chosen button").onclick = uncheck;
  scroller.onscroll = () => {
    if (scroller.scrollTop + 2 * scroller.clientHeight > scroller.scrollHeight && drawn < filtered.length) more();
  };
  dark.onchange();
  // The two latest finished runs are compared until others are chosen.
  for (const run of data.runs.filter(run => run.status === "done").slice(0, 2)) check(run, true);
  head();
  legend();
  arrange();
  requestAnimationFrame(() => performance.mark("table shown"));
}

start();
addEventListener("DOMContentLoaded", () => requestAnimationFrame(() => setTimeout(() => {
  document.head.append(element("script", {textContent: document.getElementById("plotly").textContent}));
  redraw(...Object.keys(draw));
})));
