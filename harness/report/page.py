"""The report page: one HTML file that opens from a disk or a mail without any network.

The parts lie in assets/. Embedded are the figures of every run, not its layers; what many runs
share is stored once: a histogram, a setting, the bin edges.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from harness.config.extras import need
from harness.report.figures import Column, Figure, columns, figures
from harness.report.marks import letter
from harness.report.rows import final_stage, outliers, row
from harness.report.settings import apart, dotted
from harness.report.texts import said
from harness.store import Store, write

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("data.js", "table.js", "plots.js", "page.js")
GROUPS = ("model", "data", "format", "transform", "solver")
SIDES = ("before", "after")
BETTER = {None: 0, True: -1, False: 1}  # lower is better: which way the page judges a column
POINTS = 200  # of a learning curve, about as many as a panel can show


def write_page(root: Path, path: Path, run_ids: Collection[str] | None = None) -> Path:
    """Write the page of the runs below `root` (only those in `run_ids`, if given) to `path`, in one
    step; returns `path`. Raises ConfigError without plotly."""
    need("plotly", "the page")
    from plotly.offline import get_plotlyjs

    parts = {
        "style": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        # In JSON "<" occurs only inside strings: escaped, no text of a run can end the element it
        # stands in.
        "data": json.dumps(
            _data(Path(root), run_ids), ensure_ascii=False, separators=(",", ":")
        ).replace("<", "\\u003c"),
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
    }
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    write(Path(path), re.sub(r"{{(\w+)}}", lambda field: parts[field[1]], template))
    return Path(path)


class Pool:
    """Distinct values in order of appearance; a run names one by its index."""

    def __init__(self):
        self.values: list = []
        self._index: dict[str, int] = {}

    def add(self, value) -> int:
        """The index of `value`, stored now or before."""
        key = json.dumps(value)
        if key not in self._index:
            self._index[key] = len(self.values)
            self.values.append(value)
        return self._index[key]


def _data(root: Path, run_ids: Collection[str] | None) -> dict:
    """What the page knows: {"runs", newest first, and what they share: "columns", "settings",
    "base", "histograms", "edges", "marks"}.

    A run's `config` lists the settings by which it differs from `base`, those that most runs have:
    indices to add where `base` lacks them, to take away where it has them.
    """
    settings, histograms, edges, marks = Pool(), Pool(), Pool(), Pool()
    rows = [row(run) for run in Store(root).runs() if run_ids is None or run.path.name in run_ids]
    rows.sort(key=lambda one: (one["started"] or "", one["run_id"]), reverse=True)
    configs = [
        {key: value for key, value in dotted(own).items() if key != "run_root"} for own in rows
    ]
    stages = [figures(own) for own in rows]
    finals = [own.get(final_stage(one) or "", {}) for one, own in zip(rows, stages)]
    heads = columns(finals)
    runs = []
    for index, (one, config, told) in enumerate(zip(rows, configs, apart(rows, configs))):
        untouched = stages[index].get("baseline", {})
        marked = (one["marks"] or {}).items()
        own = {group: one["labels"].get(group) for group in GROUPS} | {
            "settings": told,
            "figures": _figures(heads, finals[index]),
            "baseline": _baseline(heads, untouched),
            "marks": {name: [marks.add(text) for text in texts] for name, texts in marked},
            "texts": _texts(one) or None,
            "curves": _curves(Path(one["path"]) / "tracking" / "curves.jsonl"),
            "activations": _activations(outliers(one) or {}, histograms, edges),
            "config": {settings.add(pair) for pair in config.items()},
        }
        runs.append(_run(one) | own)
    shares = Counter(index for run in runs for index in run["config"])
    base = {index for index, count in shares.items() if 2 * count > len(runs)}
    for run in runs:
        run["config"] = sorted(run["config"] ^ base) if run["config"] else None
    return {
        "runs": [
            {key: value for key, value in run.items() if value not in (None, {}, "")}
            for run in runs
        ],
        "columns": [_column(head, finals) for head in heads],
        "settings": settings.values,
        "base": sorted(base),
        "histograms": histograms.values,
        "edges": edges.values,
        "marks": [[letter(text), text] for text in marks.values],
    }


def _run(row: dict) -> dict:
    """What the page says of a row beside its figures; nothing where it did not get so far."""
    lines = str(row["error"] or "").strip().splitlines() or [""]
    return {
        "id": row["run_id"],
        "status": row["status"],
        "stage": row["stage"],
        "sweep": row["sweep"],
        "error": lines[-1][:500],
        "started": row["started"],
        "updated": row["updated"],
        "command": row["command"],
        "bits": _number(row["bits_per_weight"], 6),
        "online": _number(row["online"], 6),
        "seconds": sum(_rounded(row["seconds"], 6).values()) or None,
        "peak": _number(row["peak_memory_mb"], 6),
    }


def _column(head: Figure, finals: Sequence[Mapping[Column, Figure]]) -> dict:
    """How a column of figures is shown: one unit and as many digits in all of its rows."""
    display = head.display
    title = display.label
    group = head.record.source
    if display.alternative:  # which of them it is differs from source to source
        title = head.record.source
        group = display.title or display.label
        if display.percent:
            group += ", %"
    values = [abs(own[head.column].value) for own in finals if head.column in own]
    places = 2 if all(value >= 1 for value in values) else 3
    return {
        "evaluation": head.record.evaluation,
        "source": head.record.source,
        "title": title,
        "group": group,
        "scale": head.scale,
        "digits": min(display.digits, places),
        "better": BETTER[display.lower_is_better],
        "change": display.change,
    }


def _figures(heads: Sequence[Figure], own: Mapping[Column, Figure]) -> dict[int, list]:
    """{column: [value, standard error, documents, metric]}, values as they were measured."""
    found = {}
    for index, head in enumerate(heads):
        if head.column not in own:
            continue
        one = own[head.column].record
        value = _number(one.value, 6)
        if value is not None:
            found[index] = [value, _number(one.stderr), one.n, one.metric]
    return found


def _baseline(heads: Sequence[Figure], untouched: Mapping[Column, Figure]) -> dict[int, float]:
    """{column: value of the untouched model} where the change is shown."""
    found = {
        index: _number(untouched[head.column].record.value, 6)
        for index, head in enumerate(heads)
        if head.display.change and head.column in untouched
    }
    return {index: value for index, value in found.items() if value is not None}


def _texts(row: Mapping) -> list[list[str]]:
    """[prompt, what the untouched model says, what the one that the run is judged by says]."""
    final = final_stage(row) or ""
    return [
        [one["prompt"], one.get("baseline", ""), one.get(final, "")] for one in said(row["stages"])
    ]


def _number(value: object, digits: int = 4) -> float | None:
    """`value` to so many significant digits; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) else short


def _rounded(values: dict | None, digits: int = 4) -> dict:
    numbers = {key: _number(value, digits) for key, value in (values or {}).items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _curves(path: Path) -> dict[str, list]:
    """{"block/rel_error": [steps, values]} of what was logged; a step logged again counts once, as
    logged last. Of a long curve POINTS are kept, evenly, and its last."""
    points: dict[str, dict[int, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:
            continue  # a kill can leave half a line
        if isinstance(point, dict) and isinstance(point.get("step"), int):
            step = point["step"]
            for name, value in _rounded(point).items():
                if "/" in name:
                    points.setdefault(name, {})[step] = value
    curves = {}
    for name, values in points.items():
        steps = sorted(values)
        thinned = steps[:: math.ceil(len(steps) / POINTS)]
        if thinned[-1] != steps[-1]:
            thinned.append(steps[-1])
        curves[name] = [thinned, [values[step] for step in thinned]]
    return curves


def _activations(profile: dict, histograms: Pool, edges: Pool) -> dict:
    """{"edges": index, "sites": {site: {"before": index, "after": index, "worst": {"before":
    {statistic: [value, layer]}}}}}, empty where none were measured."""
    sites = {}
    for site, counts in profile.get("sites", {}).items():
        sides = {
            side: histograms.add([_number(n) or 0 for n in counts[side]])
            for side in SIDES
            if side in counts
        }
        layers = [layer for layer in profile.get("rows", []) if layer.get("site") == site]
        sites[site] = {**sides, "worst": {side: _worst(layers, side) for side in sides}}
    if not sites:
        return {}
    return {"edges": edges.add([_number(edge) for edge in profile["edges"]]), "sites": sites}


def _worst(layers: list[dict], side: str) -> dict[str, list]:
    """{statistic: [value, layer]} of the layer in which the statistic is largest."""
    worst = {}
    for layer in layers:
        for name, value in _rounded(layer.get(side)).items():
            if name not in worst or value > worst[name][0]:
                worst[name] = [value, layer.get("layer")]
    return worst
