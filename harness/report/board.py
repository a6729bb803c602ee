"""The leaderboard: finished runs of one model and format, best first, each tested against the next.

    score = mean over corpora of the loss in nats, as perplexities give it

Runs stand in one table where they read the same windows of the same corpora. p is of the paired
test (paired.py) against the row below, corpus by corpus: where it is small, what a row is better by
is more than chance. Written from the store alone, as Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from harness.report.figures import NONE, in_order, row_figures
from harness.report.paired import compare
from harness.report.rows import last
from harness.report.selection import short_id
from harness.report.settings import apart, dotted

CHOICES = ("recipe", "transform", "solver", "tune")  # what a row is made by


def board(rows: Sequence[dict]) -> str:
    """The Markdown of all tables that finished runs make; rows as `rows.rows` gives them."""
    tables = [
        _table(f"{model}, {format}{_amount(tokens, read)}", group)
        for (model, format, tokens, read), group in _groups(rows)
        if len(group) > 1
    ]
    if not tables:
        return "No two finished runs of one model and format read the same windows.\n"
    return "\n".join(tables)


def _groups(rows: Sequence[dict]) -> Iterator[tuple[tuple, list[dict]]]:
    """((model, format, what was read), runs that share it)."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        stage = last(row)
        if not stage.get("ppl"):
            continue
        read = tuple((name, len(losses)) for name, losses in sorted(_losses(stage).items()))
        labels = row["labels"]
        key = (labels.get("model"), labels.get("format"), stage.get("tokens"), read)
        groups.setdefault(key, []).append(row)
    yield from sorted(groups.items(), key=lambda item: str(item[0]))


def _amount(tokens: int | None, read: Sequence[tuple[str, int]]) -> str:
    """`, 8 windows of 2048 tokens`, where a run says so."""
    counts = {count for _, count in read}
    windows = sum(count for _, count in read)
    if not tokens or not windows or len(counts) > 1:
        return ""
    return f", {counts.pop()} windows of {tokens // windows} tokens"


def _losses(stage: Mapping) -> Mapping:
    return stage.get("losses") or dict.fromkeys(stage["ppl"], ())


def score(row: dict) -> float:
    """The mean loss over corpora, in nats; infinite where a perplexity is no number."""
    values = [float(value) for value in last(row)["ppl"].values()]
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.inf
    return sum(map(math.log, values)) / len(values)


def _table(title: str, rows: list[dict]) -> str:
    rows = sorted(rows, key=score)
    shown = [row_figures(row) for row in rows]
    labels = [
        label for label in in_order(*shown) if not any(own.get(label, NONE).minor for own in shown)
    ]
    settings = apart(rows, list(map(dotted, rows)))
    choices = [name for name in CHOICES if any(_choice(row, name) for row in rows)]
    varying = ["settings"] if any(settings) else []
    heads = [*choices, *varying, *labels, "p against the next", "run"]
    lines = [f"## {title}", "", _line(heads), _line("---" for _ in heads)]
    for index, (row, differs, figures) in enumerate(zip(rows, settings, shown)):
        cells = [_choice(row, name) for name in choices]
        cells += [differs for _ in varying]
        cells += [figures.get(label, NONE).text for label in labels]
        cells.append(_against(row, rows[index + 1]) if index + 1 < len(rows) else "")
        lines.append(_line([*cells, f"`{short_id(row)}`"]))
    return "\n".join([*lines, ""])


def _choice(row: Mapping, name: str) -> str:
    option = row["labels"].get(name)
    return "" if option in (None, "none") else str(option)


def _against(row: dict, other: dict) -> str:
    """`.0078, .031`: p of each corpus."""
    pairs = compare(row, other)["corpora"].values()
    return ", ".join("" if "error" in pair else f"{pair['p']:.2g}" for pair in pairs)


def _line(cells) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
