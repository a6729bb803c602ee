"""Stored runs as a list at the terminal: which are in it, in what order, and its columns."""

import json
import os
import subprocess
import sys

import pytest
from composed import ROOT
from stored_runs import piped, root, stored

from harness.report.__main__ import main
from harness.report.marks import legend, letters
from harness.report.settings import dotted
from harness.store import write, write_json

__all__ = ["piped", "root"]  # fixtures


def test_ls_cuts_no_figure(root, capsys):
    path = root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["stages"]["quantized"]["zeroshot"] = {
        f"task{i}": {"acc": i / 10, "acc_stderr": 0.07} for i in range(9)
    }
    write_json(path, metrics)
    assert main(["ls", str(root), "transform=identity", "status=done"]) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("aaaaaaaaa1")
    ]
    assert all(f" {i * 10}.0 ± 7.0" in line for i in range(9))


def test_ls_has_a_column_for_what_varies(root, capsys):
    assert main(["ls", str(root)]) == 0
    assert "settings" not in capsys.readouterr().out
    for run_id, size in (("aaaaaaaaa1", 32), ("ccccccccc1", 64)):
        path = stored(root, f"tiny-int4-identity-gptq-{run_id}")
        write(
            path / "config.yaml",
            f"seed: 0\nhf_token: '{size}'\n"
            f"format: {{name: int4, weight: {{group_size: {size}}}}}\n",
        )
    assert main(["ls", str(root), "format=int4", "status=done"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "settings" in lines["run"]
    assert (
        " weight.group_size=32 " in lines["aaaaaaaaa1"]
        and " weight.group_size=64 " in lines["ccccccccc1"]
    )
    assert "token" not in dotted({"path": root / "tiny-int4-identity-gptq-ccccccccc1"})


def test_a_checkpoint_is_listed_by_what_made_it(root, capsys):
    path = stored(root, "checkpoint-none-identity-none-eeeeeeeee7")
    metrics = json.loads((path / "metrics.json").read_text())
    write_json(
        path / "metrics.json",
        metrics | {"holds": {"format": "int4-w4a4", "transform": "quarot", "solver": None}},
    )
    assert main(["ls", str(root), "transform=quarot"]) == 0
    (line,) = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("eeeeeeeee7")
    ]
    assert line[1:4] == ["done", "int4-w4a4", "quarot"] and "none" not in line
    assert main(["show", str(root), "eeeeeeeee7"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model=checkpoint · format=int4-w4a4 · transform=quarot · data=text" in shown


def test_marks_are_letters():
    told = {
        "a": ["first 2 of 3 windows", "adapted", "same corpus as calibration"],
        "b": ["only corpus"],
        "c": [],
    }
    assert letters(told) == {"a": "cas", "b": "o", "c": ""}
    assert (
        legend(["s", "cs"])
        == "c same corpus as calibration; s a subset, the first windows or documents only"
    )
    assert legend([""]) == ""


def test_ls_as_a_command(root):
    """In a process of its own, from the folder above the runs; and it loads no torch."""
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )

    def command(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=root.parent,
            env=environment,
            capture_output=True,
            text=True,
        )

    got = command("-m", "harness.report", "ls", "--sort", "ppl")
    assert (got.returncode, got.stderr) == (0, "")
    lines = got.stdout.splitlines()
    assert max(map(len, lines)) <= 140
    ids = [line.split()[0] for line in lines if line.startswith(("aaaa", "bbbb"))]
    assert ids == ["aaaaaaaaa1", "aaaaaaaaa2", "bbbbbbbbb3", "bbbbbbbbb4"]
    best = next(line for line in lines if line.startswith("aaaaaaaaa1"))
    ppl = json.loads((root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/metrics.json").read_text())[
        "stages"
    ]["quantized"]["ppl"]
    for shown in (
        f"{ppl['wikitext-2']:.4f} cs",
        "14.0000 ",
        "0.1000",
        "100.0 ± 7.0 s",
        "4.50",
        "12.5",
        "03-01 10:00",
    ):
        assert shown in best
    assert "interrupted" in next(line for line in lines if line.startswith("bbbbbbbbb4"))
    assert "marks: c same corpus as calibration; s a subset" in got.stdout
    assert command("-m", "harness.report", "show", "nothing").returncode == 2
    assert (
        command(
            "-c", "import harness.report.__main__, sys; sys.exit('torch' in sys.modules)"
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["format=nvfp4", "transform=hadamard"], ["aaaaaaaaa2"]),
        (["solver=gptq"], ["aaaaaaaaa1", "bbbbbbbbb3"]),
        (
            ["status=failed,interrupted", "--sort", "bits", "format=int4"],
            ["bbbbbbbbb3", "bbbbbbbbb4"],
        ),
        (["format=fp4"], []),
    ],
    ids=str,
)
def test_ls_filters(root, capsys, words, ids):
    assert main(["ls", str(root), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith(("aaaa", "bbbb"))) == ids
