"""Progress: lines without a terminal, bars on one, and a stage within a stage."""

import io

from rich.console import Console

from harness.report.progress import Reporter


def run(terminal):
    text = io.StringIO()
    reporter = Reporter(Console(file=text, force_terminal=terminal, width=100))
    with reporter.stage("outer", 20) as advance:
        for _ in range(20):
            with reporter.stage("inner", 3) as step:
                for _ in range(3):
                    step("loss 1")
            advance("done")
    with reporter.stage("another", 1) as advance:
        advance()
    return text.getvalue()


def test_lines_at_each_tenth_and_nothing_of_what_is_within():
    lines = run(terminal=False).splitlines()
    assert lines[0] == "outer: 20 steps"
    assert [line.split()[1] for line in lines[1:11]] == [f"{n}/20" for n in range(2, 21, 2)]
    assert all("done" in line for line in lines[1:11])
    assert lines[11] == "another: 1 steps"
    assert not any("inner" in line for line in lines)


def test_bars_below_one_another():
    shown = run(terminal=True)
    assert "outer" in shown
    assert "20/20" in shown
    assert "another" in shown
