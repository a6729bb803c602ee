// The plots. Each function draws one panel from the filtered or the checked runs.

const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#c45f9b", "#b07d00", "#56b4e9", "#6b6b6b"];
const DARK = ["#56b4e9", "#e69f00", "#22c296", "#d98cb8", "#f0e442", "#f0804a", "#b5b5b5"];
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star", "triangle-down", "hexagon", "pentagon"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const BITS = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32]; // where ticks stand when some runs are not quantized
const BLOCK_NAMES = {"block/rel_error": "relative error", "block/sqnr_db": "SQNR, dB"};

const part = (panel, selector) => document.querySelector(`#${panel} ${selector}`);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const palette = i => (document.documentElement.dataset.theme === "dark" ? DARK : LIGHT)[i % LIGHT.length];
const escaped = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // Plotly reads tags in its texts
const unique = list => [...new Set(list)];

const controls = {
  scatter: {corpus: choice("corpus", corpora, () => redraw("scatter"))},
  heat: {
    corpus: choice("corpus", corpora, () => redraw("heat")),
    solver: choice("solver", [], () => redraw("heat"), "best of all"),
    model: choice("model", [], () => redraw("heat")),
  },
  curves: {metric: choice("measure", measures().map(name => [name, BLOCK_NAMES[name] ?? name]), () => redraw("curves"))},
  activations: {run: choice("run", [], () => redraw("activations"))},
};
for (const [panel, choices] of Object.entries(controls)) {
  part(panel, ".controls").append(...Object.values(choices));
  for (const name in choices) choices[name] = choices[name].lastChild;
}
if (measures().includes("block/rel_error")) controls.curves.metric.value = "block/rel_error";

/** A run's label for a legend: on a phone in lines of 40 characters, for Plotly would cut it off. */
function named(run) {
  const lines = [];
  for (const part of run.label.split(" · ")) {
    const longer = lines.length ? `${lines.at(-1)} · ${part}` : part;
    if (lines.length && narrow.matches && longer.length > 40) lines.push(part);
    else lines.splice(-1, 1, longer);
  }
  return lines.map(escaped).join("<br>");
}

/** Curves over the blocks, and then what was logged a step of learning. */
function measures() {
  const all = names("curves").filter(name => !name.startsWith("outside/"));
  return [...all.filter(name => name.startsWith("block/")), ...all.filter(name => !name.startsWith("block/"))];
}

function axis(title, more = {}) {
  return {
    title: {text: title, standoff: 10, font: {size: 12}}, automargin: true, zeroline: false, gridcolor: colour("line"),
    linecolor: colour("line"), tickcolor: colour("line"), tickfont: {size: 11}, exponentformat: "power", ...more,
  };
}

/** An axis of positive values. Up to six decades its ticks are written out: powers of ten, within two decades 2 and 5 too. */
function logarithmic(title, list) {
  const [low, high] = [Math.min(...list), Math.max(...list)].map(Math.log10);
  if (high - low > 6) return axis(title, {type: "log"});
  const powers = Array.from({length: 9}, (_, i) => Math.floor(low) - 1 + i);
  const tickvals = powers.flatMap(power => (high - low < 2 ? [1, 2, 5] : [1]).map(digit => Number(`${digit}e${power}`)));
  return axis(title, {type: "log", tickvals, ticktext: tickvals.map(brief)});
}

/** Whole numbers from 0 to a greatest one, few enough to stand side by side. */
function whole(most) {
  const room = narrow.matches ? 5 : 8;
  const power = 10 ** Math.floor(Math.log10(Math.max(most / room, 1)));
  const step = [1, 2, 5, 10].map(digit => digit * power).find(step => most / step <= room);
  return Array.from({length: Math.floor(most / step) + 1}, (_, i) => i * step);
}

/** Show traces in a panel, or say why there are none. */
function show(panel, traces, layout, empty) {
  const [plot, note] = [part(panel, ".plot"), part(panel, ".empty")];
  [plot.hidden, note.hidden] = [!traces.length, Boolean(traces.length)];
  if (!traces.length) {
    Plotly.purge(plot);
    note.textContent = empty;
    return;
  }
  const common = {
    font: {family: getComputedStyle(document.body).fontFamily, color: colour("text"), size: 12},
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", margin: {l: 56, r: 12, t: 30, b: 44}, hovermode: "closest",
    hoverlabel: {bgcolor: colour("raised"), bordercolor: colour("line"), font: {color: colour("text")}, align: "left"},
    legend: {orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: {size: 11}},
    modebar: {bgcolor: "transparent", color: colour("dim"), activecolor: colour("accent")},
  };
  const config = {displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]]};
  Plotly.react(plot, traces, {...common, ...layout}, config);
}

/** The runs that no run of as few bits or fewer beats, by rising bits. */
function front(runs, corpus) {
  const sorted = [...runs].sort((a, b) => a.bits - b.bits || a.ppl[corpus] - b.ppl[corpus]);
  let best = Infinity;
  return sorted.filter(run => run.ppl[corpus] < best && (best = run.ppl[corpus]));
}

const draw = {
  scatter() {
    const corpus = controls.scatter.corpus.value;
    const runs = filtered.filter(run => run.ppl[corpus] > 0 && run.bits);
    const transforms = unique(runs.map(run => run.transform ?? "none")).sort();
    const line = {color: colour("dim"), width: 1.5, shape: "hv"};
    const edge = {width: 1, color: colour("surface")};
    const fronts = unique(runs.map(run => run.model)).map((model, i) => {
      const best = front(runs.filter(run => run.model === model), corpus);
      return {
        x: best.map(run => run.bits), y: best.map(run => run.ppl[corpus]), mode: "lines", line, name: "Pareto front",
        legendgroup: "front", showlegend: i === 0, hoverinfo: "skip",
      };
    });
    const points = transforms.map((transform, i) => {
      const own = runs.filter(run => (run.transform ?? "none") === transform);
      return {
        x: own.map(run => run.bits), y: own.map(run => run.ppl[corpus]), mode: "markers", name: escaped(transform),
        marker: {color: palette(i), symbol: SYMBOLS[i % SYMBOLS.length], size: 9, opacity: 0.85, line: edge},
        text: own.map(run => `${escaped(run.model ?? "")}<br>${escaped(run.label)}`),
        hovertemplate: "%{text}<br>%{x:.3f} bits, perplexity %{y:.3f}<extra></extra>",
      };
    });
    const list = runs.map(run => run.ppl[corpus]);
    const wide = Math.max(...list) > 4 * Math.min(...list);
    const title = `perplexity, ${escaped(corpus)}`;
    const bits = runs.map(run => run.bits);
    const far = Math.max(...bits) > 3 * Math.min(...bits) ? {type: "log", tickvals: BITS, ticktext: BITS} : {};
    const layout = {xaxis: axis("bits per weight", far), yaxis: wide ? logarithmic(title, list) : axis(title)};
    show("scatter", [...fronts, ...points], layout, "No finished run among them has a perplexity and a size.");
  },

  heat() {
    const {corpus, solver, model} = controls.heat;
    const measured = filtered.filter(run => run.ppl[corpus.value] > 0);
    const count = name => measured.filter(run => run.model === name).length;
    refill(model, values(measured, "model").sort((a, b) => count(b) - count(a))); // it opens on the model of most runs
    model.parentElement.hidden = model.options.length < 2;
    refill(solver, values(filtered, "solver"), "best of all");
    const best = new Map();
    for (const run of measured) {
      const ppl = run.ppl[corpus.value], key = `${run.transform}\n${run.format}`;
      if (run.model !== (model.value || undefined) || (solver.value && run.solver !== solver.value)) continue;
      if (!(best.get(key)?.ppl[corpus.value] <= ppl)) best.set(key, run);
    }
    const runs = [...best.values()].sort((a, b) => a.ppl[corpus.value] - b.ppl[corpus.value]);
    const [x, y] = [unique(runs.map(run => run.format)), unique(runs.map(run => run.transform))];
    const cells = y.map(transform => x.map(format => best.get(`${transform}\n${format}`)));
    const each = (shown, none) => cells.map(row => row.map(run => (run ? shown(run, run.ppl[corpus.value]) : none)));
    const [least, most] = [runs[0], runs.at(-1)].map(run => Math.log10(run?.ppl[corpus.value]));
    const end = Math.min(most, least + Math.log10(3));
    const map = {
      type: "heatmap", x: x.map(escaped), y: y.map(escaped), z: each((_, ppl) => Math.log10(ppl), null), zmin: least, zmax: end,
      text: each((_, ppl) => perplexity(ppl), ""), customdata: each(run => escaped(run.label), ""),
      colorscale: [[0, colour("accent")], [1, colour("faint")]], showscale: false, xgap: 2, ygap: 2,
      hovertemplate: "%{customdata}<br>perplexity %{text}<extra></extra>",
    };
    const dark = run => Math.log10(run.ppl[corpus.value]) < least + 0.35 * (end - least) || end === least;
    const figures = {
      mode: "text", x: runs.map(run => escaped(run.format)), y: runs.map(run => escaped(run.transform)), hoverinfo: "skip",
      text: runs.map(run => perplexity(run.ppl[corpus.value])),
      textfont: {size: 11, color: runs.map(run => colour(dark(run) ? "surface" : "text"))},
    };
    const upright = narrow.matches && x.length > 4 ? {tickangle: -90} : {};
    const layout = {
      xaxis: axis("", {type: "category", showgrid: false, ticks: "", ...upright}),
      yaxis: axis("", {type: "category", showgrid: false, ticks: "", autorange: "reversed"}),
      showlegend: false,
    };
    show("heat", runs.length ? [map, figures] : [], layout, "No finished run among them has a perplexity with this choice.");
  },

  curves() {
    const metric = controls.curves.metric.value;
    const [family, figure] = [metric.slice(0, metric.indexOf("/")), metric.slice(metric.indexOf("/") + 1)];
    const over = family === "block" ? "block" : "step";
    const runs = [...checked].map(id => byId.get(id)).filter(run => run.curves[metric]);
    const last = Math.max(0, ...runs.flatMap(run => run.curves[metric][0]));
    // Embedding and head stand behind the last block, apart from it and from each other.
    const ends = {head: `outside/lm_head/${figure}`, embedding: `outside/embed_tokens/${figure}`};
    const outside = over === "block" ? Object.keys(ends).filter(name => runs.some(run => run.curves[ends[name]])) : [];
    const places = outside.map((_, i) => last + (i + 1) * Math.max(1, 0.2 * last));
    const traces = runs.flatMap((run, i) => {
      const line = {color: palette(i), width: 2, dash: DASHES[Math.floor(i / LIGHT.length) % DASHES.length]};
      const symbol = SYMBOLS[i % SYMBOLS.length];
      const common = {name: named(run), legendgroup: run.id, line};
      const [x, y] = run.curves[metric];
      const along = {
        ...common, x, y, mode: x.length < 100 ? "lines+markers" : "lines", marker: {size: 5, symbol},
        hovertemplate: `${over} %{x}: %{y:.4g}<extra>%{fullData.name}</extra>`,
      };
      const own = outside.filter(name => run.curves[ends[name]]);
      const beside = {
        ...common, x: own.map(name => places[outside.indexOf(name)]), y: own.map(name => run.curves[ends[name]][1][0]),
        text: own, mode: "markers", marker: {size: 9, symbol: `${symbol}-open`, color: palette(i)}, showlegend: false,
        hovertemplate: "%{text}: %{y:.4g}<extra>%{fullData.name}</extra>",
      };
      return own.length ? [along, beside] : [along];
    });
    const xaxis = axis(over, {
      tickvals: [...whole(last), ...places], ticktext: [...whole(last).map(n => fixed(n, 0)), ...outside],
    });
    const title = BLOCK_NAMES[metric] ?? escaped(metric);
    const list = traces.flatMap(trace => trace.y).filter(y => y > 0);
    const decibel = metric.endsWith("_db");
    const wide = !decibel && Math.max(...list) > 4 * Math.min(...list);
    const yaxis = wide ? logarithmic(title, list) : axis(title, {rangemode: decibel || over === "step" ? "normal" : "tozero"});
    const empty = checked.size ? "The checked runs stored no such curve." : "Check runs in the table to draw their curves.";
    show("curves", traces, {xaxis, yaxis, showlegend: true}, empty);
  },

  diff() {
    const [box, note] = [part("diff", ".scroll"), part("diff", ".empty")];
    const runs = [...checked].map(id => byId.get(id));
    const [left, right] = runs.map(settings);
    const pair = runs.length === 2;
    const keys = pair && left && right ? unique([...left.keys(), ...right.keys()]).sort() : [];
    const rows = keys.filter(key => left.get(key) !== right.get(key));
    box.hidden = !rows.length;
    note.hidden = Boolean(rows.length);
    note.textContent = !pair ? "Check exactly two runs in the table."
      : keys.length ? "Their settings are the same." : "One of them stored no settings.";
    const titles = ["setting", ...runs.map(run => run.label)];
    const value = (run, key) => element("td", {}, run.get(key) ?? element("span", {className: "dim", title: "not set"}, "–"));
    const lines = rows.map(key => element("tr", {}, element("th", {scope: "row"}, key), value(left, key), value(right, key)));
    box.replaceChildren(tabular(titles, lines));
  },

  texts() {
    const runs = [...checked].map(id => byId.get(id)).filter(run => run.texts);
    const [box, note] = [part("texts", ".scroll"), part("texts", ".empty")];
    document.getElementById("texts").hidden = !data.runs.some(run => run.texts);
    box.hidden = !runs.length;
    note.hidden = Boolean(runs.length);
    note.textContent = "No checked run was asked anything.";
    const lines = unique(runs.flatMap(run => run.texts.map(([prompt]) => prompt))).map(prompt => {
      const asked = runs.map(run => run.texts.find(([text]) => text === prompt));
      const untouched = asked.find(Boolean)[1];
      const said = [untouched, ...asked.map(found => found?.[2])];
      const cells = said.map(text => element("td", {}, text ?? element("span", {className: "dim", title: "not asked"}, "–")));
      return element("tr", {}, element("th", {scope: "row"}, prompt), ...cells);
    });
    box.replaceChildren(tabular(["prompt", "untouched", ...runs.map(run => run.label)], lines));
  },

  activations() {
    const select = controls.activations.run;
    const measured = run => run.activations;
    const runs = filtered.filter(measured);
    const newest = [...checked].map(id => byId.get(id)).filter(measured).pop();
    const chosen = byId.get(select.value);
    refill(select, unique([...runs, ...(newest ? [newest] : [])]).map(run => [run.id, run.label]));
    if (newest && newest !== draw.activations.newest) select.value = newest.id;
    else if (chosen && runs.includes(chosen)) select.value = chosen.id;
    draw.activations.newest = newest;
    const found = byId.get(select.value)?.activations;
    const sites = Object.entries(found?.sites ?? {});
    const edges = found ? data.edges[found.edges] : [];
    const columns = Math.max(narrow.matches ? Math.min(sites.length, 2) : sites.length, 1);
    const rows = Math.max(Math.ceil(sites.length / columns), 1);
    const layout = {grid: {rows, columns, pattern: "independent", xgap: 0.18, ygap: 0.4}, showlegend: true};
    const traces = sites.flatMap(([site, sides], i) => {
      const n = i ? i + 1 : "";
      layout[`xaxis${n}`] = axis(`|x| at ${escaped(site)}`, {type: "log", dtick: narrow.matches ? 4 : 2});
      layout[`yaxis${n}`] = axis(i % columns ? "" : "count", {type: "log", dtick: 2});
      return ["before", "after"].filter(side => side in sides).map((side, k) => {
        const counts = data.histograms[sides[side]];
        return {
          x: counts.map((_, j) => Math.sqrt(edges[j] * edges[j + 1])), y: counts.map(count => count || null),
          mode: "lines", name: side,
          line: {shape: "hvh", width: 2, color: palette(k), dash: k ? "solid" : "dot"}, legendgroup: side, showlegend: !i,
          xaxis: `x${n}`, yaxis: `y${n}`, hovertemplate: `%{y} near %{x:.3g}<extra>${side}</extra>`,
        };
      });
    });
    show("activations", traces, layout, "No run among them stored its activations.");
    part("activations", ".scroll").replaceChildren(...(sites.length ? [worst(sites)] : []));
  },
};

/** The table of each site's worst layers. */
function worst(sites) {
  const statistics = [["kurtosis", "kurtosis"], ["max_over_median", "max / median"]];
  const columns = statistics.flatMap(([key, title]) => ["before", "after"].map(side => [key, side, `${title} ${side}`]));
  const lines = sites.map(([site, sides]) => {
    const cells = columns.map(([key, side]) => {
      const [value, layer] = sides.worst[side]?.[key] ?? [];
      return element("td", {}, brief(value), element("small", {}, value === undefined ? "" : ` layer ${layer}`));
    });
    return element("tr", {}, element("th", {scope: "row"}, site), ...cells);
  });
  return tabular(["site", ...columns.map(([, , title]) => title)], lines);
}

function tabular(titles, lines) {
  const headers = titles.map(title => element("th", {scope: "col"}, title));
  return element("table", {}, element("thead", {}, element("tr", {}, ...headers)), element("tbody", {}, ...lines));
}
