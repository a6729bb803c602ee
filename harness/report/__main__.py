"""Stored runs at the terminal: `python -m harness.report ls|show|diff|failed|prune|page [RUNS]
...`; RUNS is the run root.

Exit status: 0 done, 2 the arguments are wrong or name no run. Imports no torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from harness.config.errors import ConfigError
from harness.report import rows as stored
from harness.report.figures import Cell, in_order, number, row_figures
from harness.report.marks import legend, letters
from harness.report.paired import compare, settings
from harness.report.prune import doomed, freed, remove
from harness.report.rows import LABELS
from harness.report.selection import (
    filtered,
    find,
    root_and_filters,
    root_and_runs,
    short_id,
    unrecorded,
)
from harness.report.settings import apart, dotted
from harness.report.table import run_table, terminal
from harness.report.table import show as show_table

WORST = 5  # layers that `show` names
NONE = Cell(None, "", (0, 0))  # of a run that has no such figure


def main(argv: list[str] | None = None) -> int:
    """The exit status of a command line."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)  # words may stand before and after options
    if any(word.startswith("-") for word in more):
        parser.error(f"unknown option: {' '.join(more)}")
    arguments.words += more
    try:
        arguments.command(arguments)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description="What the stored runs say."
    )
    commands = parser.add_subparsers(required=True, metavar="ls|show|diff|failed|prune|page")

    def command(function, words: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=about, description=about)
        added.add_argument(
            "words",
            nargs="*",
            metavar=words,
            help="RUNS: the run root, else runs; RUN: part of a run id",
        )
        added.set_defaults(command=function)
        return added

    filters = "RUNS|format=nvfp4|status=done|..."
    listed = command(ls, filters, "a table of the runs")
    listed.add_argument(
        "--sort",
        metavar="FIGURE",
        help="lowest first: ppl, 'ppl wikitext-2', KL, acc, bits, seconds",
    )
    command(show, "[RUNS] RUN", "everything about one run")
    command(
        diff,
        "[RUNS] A B",
        "settings that differ, figures side by side, and whether the difference is chance",
    )
    command(failed, "RUNS", "failed and interrupted runs, and how to try them again")
    pruned = command(
        prune, filters, "remove failed and interrupted runs; without --yes only lists them"
    )
    pruned.add_argument(
        "--blocks",
        action="store_true",
        help="also the quantized blocks of finished runs; their figures stay",
    )
    pruned.add_argument("--yes", action="store_true", help="remove")
    command(page, "RUNS", "write the HTML page").add_argument(
        "--out", type=Path, help="RUNS/report.html unless given"
    )
    return parser


def ls(arguments) -> None:
    """Runs as a table: choices, the settings that tell runs of the same choices apart, and the
    figures of the last stage with their honesty marks."""
    root, filters = root_and_filters(arguments.words)
    rows = filtered(stored.rows(root), filters)
    shown = {row["run_id"]: row_figures(row) for row in rows}
    labels = in_order(*shown.values())
    if arguments.sort:
        by = next((label for label in labels if arguments.sort.lower() in label.lower()), None)
        if by is None:
            raise ConfigError(
                f"--sort {arguments.sort}: no such figure; there are {', '.join(labels)}."
            )
        rows.sort(key=lambda row: _or_last(shown[row["run_id"]].get(by, NONE).value))
    minor = {label for own in shown.values() for label, cell in own.items() if cell.minor}
    labels = [label for label in labels if label not in minor]
    table = Table(
        title=f"{len(rows)} runs",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    told = apart(rows, list(map(dotted, rows)))
    for column in ("run", "status", *LABELS[1:], *(["settings"] if any(told) else [])):
        table.add_column(column)
    for label in labels:
        table.add_column(Text(label.replace(" ", "\n")), justify="right")
    table.add_column("started")
    for row, differs in zip(rows, told):
        texts = [shown[row["run_id"]].get(label, NONE).text for label in labels]
        choices = [row["labels"].get(group) or "" for group in LABELS[1:]] + [differs] * any(told)
        cells = [
            short_id(row),
            row["status"],
            *choices,
            *texts,
            (row["started"] or "")[5:16].replace("T", " "),
        ]
        table.add_row(
            *map(Text, cells), style={"done": None, "running": "cyan"}.get(row["status"], "red")
        )
    show_table(table, terminal())
    _say_marks(rows)


def show(arguments) -> None:
    """One run: stages, marks, warnings, the worst layers, outliers, and what went wrong."""
    root, names = root_and_runs(arguments.words, 1)
    row = find(stored.rows(root), names[0])
    _say(f"{row['run_id']}  {row['status']}  started {row['started']}")
    _say(f"command: {row['command'] or unrecorded(row)}")
    run_table(row, Path(row["path"]), terminal())
    for name, told in row["marks"].items():
        if told:
            _say(f"mark {name}: {'; '.join(told)}")
    measured = [layer for layer in row["layers"] if layer.get("rel_error") is not None]
    worst = sorted(measured, key=lambda layer: -layer["rel_error"])[:WORST]
    if worst:
        cells = [
            [layer["name"], number(layer["rel_error"], 6), number(layer.get("sqnr_db"), 2)]
            for layer in worst
        ]
        _print("worst layers", ["layer", "relative error", "SQNR dB"], cells)
    _show_outliers((stored.outliers(row) or {}).get("rows") or [])
    if row["error"]:
        _say(
            f"failed in stage {row['stage']}: {row['error']}\nThe traceback is in {Path(row['path']) / 'status.json'}."
        )


def _show_outliers(sites: list[dict]) -> None:
    """The site of the largest kurtosis before the transform, and after it."""
    cells = []
    for side in ("before", "after"):
        known = [site for site in sites if (site.get(side) or {}).get("kurtosis") is not None]
        if known:
            worst = max(known, key=lambda site: site[side]["kurtosis"])
            pairs = [
                [number((worst.get(s) or {}).get(figure), 1) for s in ("before", "after")]
                for figure in ("kurtosis", "max_over_median")
            ]
            cells.append(
                [
                    f"worst {side}",
                    f"layer {worst.get('layer')} {worst.get('site')}",
                    *map(" -> ".join, pairs),
                ]
            )
    if cells:
        _print(
            "outliers, before -> after the transform", ["", "site", "kurtosis", "max/median"], cells
        )


def diff(arguments) -> None:
    """Two runs: settings that differ, figures, and the paired tests of what they measured alike."""
    root, names = root_and_runs(arguments.words, 2)
    rows = stored.rows(root)
    a, b = (find(rows, name) for name in names)
    sides = [f"A {short_id(a)}", f"B {short_id(b)}"]
    _print(
        "settings that differ",
        ["setting", *sides],
        [[key, *map(str, both)] for key, both in settings(a, b).items()],
    )
    ours = row_figures(a)
    theirs = row_figures(b)
    cells = []
    for label in in_order(ours, theirs):
        left = ours.get(label, NONE)
        right = theirs.get(label, NONE)
        both = left.value is not None and right.value is not None
        cells.append(
            [label, left.text, right.text, f"{right.value - left.value:+.4f}" if both else ""]
        )
    _print("figures", ["", *sides, "B - A"], cells)
    _say_marks([a, b])
    pairs = compare(a, b)
    cells = [
        [
            name,
            str(p["n"]),
            f"{p['difference']:+.5f}" + ("" if p["se"] is None else f" ± {p['se']:.5f}"),
            f"{p['ratio']:.4f}",
            f"{p['p']:.4g}",
            f"{p['test']}, least p {p['least']:.2g}" if p["least"] else p["test"],
        ]
        for name, p in pairs["corpora"].items()
        if "error" not in p
    ]
    if cells:
        _print(
            "window losses, paired",
            ["corpus", "windows", "B - A in nats", "ppl B/A", "p", "test"],
            cells,
        )
    cells = [
        [
            name,
            p["metric"],
            str(p["n"]),
            f"{100 * p['a']:.1f}",
            f"{100 * p['b']:.1f}",
            str(p["lost"]),
            str(p["won"]),
            f"{p['p']:.4g}",
        ]
        for name, p in pairs["tasks"].items()
        if "error" not in p
    ]
    if cells:
        _print(
            "answers, paired",
            ["task", "metric", "n", "A %", "B %", "right -> wrong", "wrong -> right", "McNemar p"],
            cells,
        )
    for name, pair in (pairs["corpora"] | pairs["tasks"]).items():
        if "error" in pair:
            _say(f"{name}: {pair['error']}")
    if not any(pairs.values()):
        _say("nothing can be paired: no window losses or samples that both runs keep")
    if a["choices"].get("model") != b["choices"].get("model"):
        _say("two models: their windows hold the same text only where they share a tokenizer")


def failed(arguments) -> None:
    """Runs that did not end, the last line of their error, and the command that tries each
    again."""
    root, filters = root_and_filters(arguments.words)
    rows = [
        row
        for row in filtered(stored.rows(root), filters)
        if row["status"] not in ("done", "running")
    ]
    cells = [
        [
            short_id(r),
            r["status"],
            r["stage"] or "",
            (r["updated"] or r["started"] or "")[:16].replace("T", " "),
            ((r["error"] or "").strip().splitlines() or [""])[-1],
        ]
        for r in rows
    ]
    _print(
        f"{len(rows)} failed and interrupted runs",
        ["run", "status", "stage", "last seen", "error"],
        cells,
    )
    for row in rows:
        _say(f"{short_id(row)}: {row['command'] or unrecorded(row)}")


def prune(arguments) -> None:
    """List, and with --yes remove, runs that did not end and, with --blocks, the solved blocks of
    those that did."""
    root, filters = root_and_filters(arguments.words)
    targets = [
        (row, target)
        for row in filtered(stored.rows(root), filters)
        if (target := doomed(row, arguments.blocks))
    ]
    sizes = freed([target for _, target in targets])
    cells = [
        [
            short_id(row),
            row["status"],
            "blocks" if target.name == "blocks" else "run",
            f"{size / 1e6:.1f}",
        ]
        for (row, target), size in zip(targets, sizes)
    ]
    _print(
        f"{len(targets)} to remove, {sum(sizes) / 1e6:.1f} MB",
        ["run", "status", "what", "MB"],
        cells,
    )
    if not arguments.yes:
        _say("nothing removed; --yes removes them" if targets else "nothing to remove")
        return
    for row, target in targets:
        if not remove(row, target):
            _say(f"{short_id(row)}: left alone, a process went on with it")


def page(arguments) -> None:
    """Write the HTML page and say where."""
    from harness.report.page import write_page

    root, _ = root_and_runs(arguments.words, 0)
    _say(str(write_page(root, arguments.out or root / "report.html")))


def _or_last(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _say_marks(rows: list[dict]) -> None:
    told = legend(
        text for row in rows if row["status"] == "done" for text in letters(row["marks"]).values()
    )
    if told:
        _say(f"marks: {told}")


def _print(title: str, columns: list[str], cells: list[list[str]]) -> None:
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for texts in cells:
        table.add_row(*map(Text, texts))
    terminal().print(table)


def _say(text: str) -> None:
    terminal().print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
