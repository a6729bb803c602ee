"""The leaderboard: finished runs of one model and format, best first, each tested against the next.

    score = mean over corpora of the loss in nats, as perplexities give it

Runs stand in one table where they read the same windows of the same corpora, and in one row where
nothing but the seed tells them apart: mean and standard deviation over its runs. p is of the paired
test (paired.py) against the row below, corpus by corpus, of losses averaged over seeds: where it is
small, what a row is better by is more than the chance of these windows. Written from the store
alone, as Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev

from harness.report.figures import NONE, Cell, in_order, number, row_figures
from harness.report.marks import legend, letters
from harness.report.paired import losses
from harness.report.rows import last
from harness.report.selection import short_id
from harness.report.settings import apart, dotted, seedless

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
    return fmean(map(math.log, values))


def _table(title: str, rows: list[dict]) -> str:
    seeds: dict[tuple, list[dict]] = {}
    for row in rows:
        seeds.setdefault(seedless(row), []).append(row)
    entries = sorted(seeds.values(), key=lambda entry: fmean(map(score, entry)))
    shown = [_figures(entry) for entry in entries]
    labels = [
        label for label in in_order(*shown) if not any(own.get(label, NONE).minor for own in shown)
    ]
    firsts = [entry[0] for entry in entries]
    settings = apart(firsts, [{**dotted(row), "seed": "any"} for row in firsts], CHOICES)
    choices = [name for name in CHOICES if any(_choice(row, name) for row in firsts)]
    varying = ["settings"] if any(settings) else []
    heads = [*choices, *varying, *labels, "p against the next", "run"]
    lines = [f"## {title}", "", _line(heads), _line("---" for _ in heads)]
    for index, (entry, differs, figures) in enumerate(zip(entries, settings, shown)):
        cells = [_choice(entry[0], name) for name in choices]
        cells += [differs for _ in varying]
        cells += [figures.get(label, NONE).text for label in labels]
        cells.append(_against(entry, entries[index + 1]) if index + 1 < len(entries) else "")
        lines.append(_line([*cells, ", ".join(f"`{short_id(row)}`" for row in entry)]))
    told = legend(text for row in rows for text in letters(row["marks"]).values())
    return "\n".join([*lines, "", f"{told}.", ""] if told else [*lines, ""])


def _choice(row: Mapping, name: str) -> str:
    option = row["labels"].get(name)
    return "" if option in (None, "none") else str(option)


def _figures(entry: Sequence[dict]) -> dict[str, Cell]:
    """{label: cell} of runs that differ in their seed; of several mean and standard deviation."""
    found = [row_figures(row) for row in entry]
    if len(found) == 1:
        return found[0]
    merged = {}
    for label, cell in found[0].items():
        values = [own[label].value for own in found if label in own]
        known = [value for value in values if value is not None]
        if len(known) == len(found):
            text = f"{number(fmean(known), 3)} ± {number(stdev(known), 3)}"
            merged[label] = Cell(fmean(known), text, cell.order, cell.minor)
    return merged


def _against(entry: Sequence[dict], other: Sequence[dict]) -> str:
    """`.0078, .031`: p of each corpus; nothing of one whose windows cannot be paired."""
    ours = _mean_losses(entry)
    theirs = _mean_losses(other)
    return ", ".join(_p(ours[corpus], theirs[corpus]) for corpus in ours)


def _p(ours: Sequence[float], theirs: Sequence[float]) -> str:
    try:
        return f"{losses(ours, theirs)['p']:.2g}"
    except ValueError:  # not kept, or not finite
        return ""


def _mean_losses(entry: Sequence[dict]) -> dict[str, list[float]]:
    """{corpus: each window's loss}, over the runs of the row."""
    each = [_losses(last(row)) for row in entry]
    return {corpus: list(map(fmean, zip(*(own[corpus] for own in each)))) for corpus in each[0]}


def _line(cells) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
