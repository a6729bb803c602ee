"""Two runs side by side: settings that differ, figures, and whether what differs is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.report.figures import NONE, in_order, row_figures
from harness.report.paired import compare, settings
from harness.report.selection import short_id
from harness.report.table import print_table, say, say_marks

LOSSES = ["corpus", "windows", "B - A in nats", "ppl B/A", "p", "test"]
ANSWERS = ["task", "metric", "n", "A %", "B %", "right -> wrong", "wrong -> right", "McNemar p"]


def show_difference(a: dict, b: dict) -> None:
    """Print what tells two rows apart."""
    sides = [f"A {short_id(a)}", f"B {short_id(b)}"]
    differing = [[key, *map(str, both)] for key, both in settings(a, b).items()]
    print_table("settings that differ", ["setting", *sides], differing)
    print_table("figures", ["", *sides, "B - A"], _figures(a, b))
    say_marks([a, b])
    pairs = compare(a, b)
    paired = _sound(pairs["corpora"])
    if paired:
        cells = [_losses(name, pair) for name, pair in paired.items()]
        print_table("window losses, paired", LOSSES, cells)
    paired = _sound(pairs["tasks"])
    if paired:
        cells = [_answers(name, pair) for name, pair in paired.items()]
        print_table("answers, paired", ANSWERS, cells)
    for name, pair in (pairs["corpora"] | pairs["tasks"]).items():
        if "error" in pair:
            say(f"{name}: {pair['error']}")
    if not any(pairs.values()):
        say("nothing can be paired: no window losses or samples that both runs keep")
    if a["choices"].get("model") != b["choices"].get("model"):
        say("two models: their windows hold the same text only where they share a tokenizer")


def _figures(a: Mapping, b: Mapping) -> list[list[str]]:
    ours = row_figures(a)
    theirs = row_figures(b)
    cells = []
    for label in in_order(ours, theirs):
        left = ours.get(label, NONE)
        right = theirs.get(label, NONE)
        change = ""
        if left.value is not None and right.value is not None:
            change = f"{right.value - left.value:+.4f}"
        cells.append([label, left.text, right.text, change])
    return cells


def _sound(pairs: Mapping[str, dict]) -> dict[str, dict]:
    return {name: pair for name, pair in pairs.items() if "error" not in pair}


def _losses(name: str, pair: Mapping) -> Sequence[str]:
    difference = f"{pair['difference']:+.5f}"
    if pair["se"] is not None:
        difference += f" ± {pair['se']:.5f}"
    test = pair["test"]
    if pair["least"]:  # few windows: no difference, however large, can give a smaller p
        test += f", least p {pair['least']:.2g}"
    return [
        name,
        str(pair["n"]),
        difference,
        f"{pair['ratio']:.4f}",
        f"{pair['p']:.4g}",
        test,
    ]


def _answers(name: str, pair: Mapping) -> Sequence[str]:
    return [
        name,
        pair["metric"],
        str(pair["n"]),
        f"{100 * pair['a']:.1f}",
        f"{100 * pair['b']:.1f}",
        str(pair["lost"]),
        str(pair["won"]),
        f"{pair['p']:.4g}",
    ]
