"""Stored runs at the terminal.

    python -m harness.report ls|show|diff|board|keep|failed|prune|page [RUNS] ...

RUNS is the run root, else runs. Exit status: 0 done, 2 the arguments are wrong or name no run.
Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from harness.config.errors import ConfigError
from harness.report import rows as stored
from harness.report.detail import show_run
from harness.report.difference import show_difference
from harness.report.listing import show_runs
from harness.report.prune import doomed, freed, remove
from harness.report.selection import (
    filtered,
    find,
    root_and_filters,
    root_and_runs,
    short_id,
    unrecorded,
)
from harness.report.table import print_table, say
from harness.store.files import write


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
    commands = parser.add_subparsers(
        required=True, metavar="ls|show|diff|board|keep|failed|prune|page"
    )

    def command(
        function: Callable[[argparse.Namespace], None], words: str, about: str
    ) -> argparse.ArgumentParser:
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
    command(
        board, filters, "finished runs of each model and format, best first, as Markdown"
    ).add_argument("--out", type=Path, help="a file to write instead of showing it")
    command(
        keep, filters, "copy settings, figures and losses of finished runs, for another `board`"
    ).add_argument("--into", type=Path, required=True, help="a folder, which is a run root then")
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


def ls(arguments: argparse.Namespace) -> None:
    """A table of the runs."""
    root, filters = root_and_filters(arguments.words)
    show_runs(filtered(stored.rows(root), filters), arguments.sort)


def show(arguments: argparse.Namespace) -> None:
    """Everything about one run."""
    root, names = root_and_runs(arguments.words, 1)
    show_run(find(stored.rows(root), names[0]))


def diff(arguments: argparse.Namespace) -> None:
    """Two runs: settings that differ, figures, and the paired tests of what they measured alike."""
    root, names = root_and_runs(arguments.words, 2)
    rows = stored.rows(root)
    show_difference(find(rows, names[0]), find(rows, names[1]))


def board(arguments: argparse.Namespace) -> None:
    """The leaderboard of the runs, shown or written."""
    from harness.report.board import board as tables

    root, filters = root_and_filters(arguments.words)
    text = tables(filtered(stored.rows(root), filters))
    if arguments.out is None:
        say(text)
        return
    heading = "# Leaderboard\n\nWritten by `python -m harness.report board RUNS --out FILE`.\n\n"
    write(arguments.out, heading + text)
    say(str(arguments.out))


def keep(arguments: argparse.Namespace) -> None:
    """Copy what a leaderboard needs of finished runs, and say how many there were."""
    from harness.report.keep import keep as copied

    root, filters = root_and_filters(arguments.words)
    rows = filtered(stored.rows(root), filters)
    kept = [copied(row, arguments.into) for row in rows]
    say(f"{len(kept) - kept.count(None)} runs are kept in {arguments.into}")


def failed(arguments: argparse.Namespace) -> None:
    """Runs that did not end, the last line of their error, and the command that tries each
    again."""
    root, filters = root_and_filters(arguments.words)
    rows = [
        row
        for row in filtered(stored.rows(root), filters)
        if row["status"] not in ("done", "running")
    ]
    cells = []
    for row in rows:
        seen = (row["updated"] or row["started"] or "")[:16].replace("T", " ")
        lines = (row["error"] or "").strip().splitlines() or [""]
        cells.append([short_id(row), row["status"], row["stage"] or "", seen, lines[-1]])
    print_table(
        f"{len(rows)} failed and interrupted runs",
        ["run", "status", "stage", "last seen", "error"],
        cells,
    )
    for row in rows:
        say(f"{short_id(row)}: {row['command'] or unrecorded(row)}")


def prune(arguments: argparse.Namespace) -> None:
    """List, and with --yes remove, runs that did not end and, with --blocks, the solved blocks of
    those that did."""
    root, filters = root_and_filters(arguments.words)
    targets = []
    for row in filtered(stored.rows(root), filters):
        target = doomed(row, arguments.blocks)
        if target is not None:
            targets.append((row, target))
    sizes = freed([target for _, target in targets])
    cells = []
    for (row, target), size in zip(targets, sizes):
        what = "blocks" if target.name == "blocks" else "run"
        cells.append([short_id(row), row["status"], what, f"{size / 1e6:.1f}"])
    print_table(
        f"{len(targets)} to remove, {sum(sizes) / 1e6:.1f} MB",
        ["run", "status", "what", "MB"],
        cells,
    )
    if not arguments.yes:
        say("nothing removed; --yes removes them" if targets else "nothing to remove")
        return
    for row, target in targets:
        if not remove(row, target):
            say(f"{short_id(row)}: left alone, a process went on with it")


def page(arguments: argparse.Namespace) -> None:
    """Write the HTML page and say where."""
    from harness.report.page import write_page

    root, _ = root_and_runs(arguments.words, 0)
    say(str(write_page(root, arguments.out or root / "report.html")))


if __name__ == "__main__":
    sys.exit(main())
