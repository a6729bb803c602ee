"""Stored runs at the terminal, on run directories written here: tables, paired tests against
counting, what prune keeps."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from composed import ROOT
from omegaconf import OmegaConf

from harness.report import __main__ as terminal
from harness.report.__main__ import main
from harness.report.marks import legend, letters
from harness.report.paired import compare, flips, losses
from harness.report.rows import row
from harness.report.settings import apart, dotted
from harness.store import Run, locked, write, write_json

MARKS = {
    "wikitext-2": ["same corpus as calibration", "first 8 of 145 windows"],
    "arc_easy": ["first 40 documents"],
}


@pytest.fixture(autouse=True)
def piped(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def stored(
    root: Path, run_id: str, status: str = "done", shift: float = 0.0, error=None, windows: int = 8
) -> Path:
    """A run directory as a run leaves it. Losses and answers are drawn from the same seed, then
    moved by `shift` nats."""
    generator, path, solver = random.Random(0), root / run_id, run_id.split("-")[3]
    nats = [generator.uniform(2.5, 3.5) + shift for _ in range(windows)]
    draw = generator.random
    answers = [
        {"doc": i, "acc": float(draw() < 0.5), "acc_norm": float(draw() > shift)} for i in range(40)
    ]
    right = sum(answer["acc_norm"] for answer in answers) / 40
    quantized = {
        "ppl": {"wikitext-2": math.exp(sum(nats) / windows), "pydoc": 14.0 + shift},
        "tokens": 2 * windows * 2048,
        "losses": {"wikitext-2": nats, "pydoc": nats},
        "divergence": {"wikitext-2": {"kl": 0.1 + shift, "top1": 0.83}},
        "zeroshot": {
            "arc_easy": {
                "acc": 0.5,
                "acc_stderr": 0.08,
                "acc_norm": right,
                "acc_norm_stderr": 0.07,
                "n": 40,
            }
        },
    }
    choices = dict(zip(("model", "format", "transform", "solver"), run_id.split("-"))) | {
        "data": "text",
        "experiment": None,
    }
    config = {"seed": 0, "solver": {"name": solver, "tasks": ["[a]", "b"]}, "run_root": "r"}
    write(path / "config.yaml", OmegaConf.to_yaml(config))
    began = {
        "status": status,
        "stage": "solve",
        "started": "2026-03-01T10:00:00+0000",
        "error": error,
    }
    write_json(path / "status.json", began)
    stages = {"baseline": {"ppl": {"wikitext-2": 17.0, "pydoc": 9.0}}} | (
        {"quantized": quantized} if status == "done" else {}
    )
    write_json(
        path / "metrics.json",
        {
            "run_id": run_id,
            "status": status,
            "choices": choices,
            "command": f"python run.py solver={solver} seed=0",
            "stages": stages,
            "bits_per_weight": 4.5 if status == "done" else None,
            "seconds": {"load": 1.0, "solve": 11.5},
            "peak_memory_mb": 1000.0,
            "layers": [
                {"name": f"layers.{i}.q_proj", "rel_error": i / 100, "sqnr_db": 20.0 - i}
                for i in range(9)
            ],
            "warnings": ["[careful]"],
            "notes": {},
            "marks": MARKS,
        },
    )
    write_json(
        path / "outliers.json",
        {
            "rows": [
                {
                    "layer": i,
                    "site": "down_in",
                    "before": {"kurtosis": 10.0 * i, "max_over_median": 312.0},
                    "after": {"kurtosis": 7.0 - i, "max_over_median": 3.0},
                }
                for i in range(4)
            ]
        },
    )
    write_json(path / "samples" / "quantized" / "arc_easy.json", answers)
    write(path / "blocks" / "0000.safetensors", "x" * 2_000_000)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    stored(tmp_path / "runs", "tiny-nvfp4-identity-gptq-aaaaaaaaa1")
    stored(tmp_path / "runs", "tiny-nvfp4-hadamard-rtn-aaaaaaaaa2", shift=0.3)
    stored(
        tmp_path / "runs",
        "tiny-int4-identity-gptq-bbbbbbbbb3",
        "failed",
        error="RuntimeError: first\nthe last [line]",
    )
    stored(tmp_path / "runs", "tiny-int4-identity-rtn-bbbbbbbbb4", "running")
    (tmp_path / "runs" / "_shared").mkdir()
    return tmp_path / "runs"


def samples(acc, acc_norm=None) -> list[dict]:
    norms = [{}] * len(acc) if acc_norm is None else [{"acc_norm": x} for x in acc_norm]
    return [{"doc": i, "acc": x, **norm} for i, (x, norm) in enumerate(zip(acc, norms))]


def test_flips_by_hand():
    """One lost and five won: 2 (1 + 6) / 2^6."""
    a, b = samples([1, 0, 0, 0, 0, 0, 1, 0]), samples([0, 1, 1, 1, 1, 1, 1, 0])
    found = flips(a, [*reversed(b), {"doc": 99, "acc": 1}])
    assert found == {
        "metric": "acc",
        "n": 8,
        "a": 2 / 8,
        "b": 6 / 8,
        "lost": 1,
        "won": 5,
        "p": pytest.approx(14 / 64),
    }
    assert flips(a, a)["p"] == 1
    assert flips(samples([0] * 8), samples([1] * 8))["p"] == pytest.approx(2 / 256)
    with pytest.raises(ValueError, match="no document"):
        flips(a, [{"doc": 99, "acc": 1}])


def test_flips_take_the_normalized_answer_where_both_have_it():
    plain, both = samples([1, 1]), samples([1, 1], [0, 1])
    assert (flips(both, both)["metric"], flips(both, both)["a"]) == ("acc_norm", 0.5)
    assert (flips(plain, both)["metric"], flips(plain, both)["b"]) == ("acc", 1)


@pytest.mark.parametrize("n", [1, 2, 6, 9])
def test_sign_flips_equal_enumeration(n):
    generator = random.Random(n)
    a, b = ([generator.gauss(3, 0.1) for _ in range(n)] for _ in range(2))
    apart = [y - x for x, y in zip(a, b)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, apart)))
        for signs in itertools.product((1, -1), repeat=n)
    ]
    assert losses(a, b)["p"] == sum(s >= abs(sum(apart)) - 1e-12 for s in sums) / 2**n
    assert losses(a, b)["ratio"] == pytest.approx(math.exp(sum(b) / n) / math.exp(sum(a) / n))


def test_window_losses_by_hand():
    """Eight windows allow 2/256 and no less. Six of eight steps up: as far out lie 2 (1 + 8 + 28)
    of 256 sums, ties and all."""
    zeros = [3.0] * 8
    found = losses(zeros, [3.1, 3.2, 3.3, 3.1, 3.2, 3.3, 3.1, 3.5])
    assert found["p"] == found["least"] == 2 / 256
    assert (found["difference"], found["se"]) == (
        pytest.approx(0.225),
        pytest.approx(0.13887 / math.sqrt(8), rel=1e-3),
    )
    assert losses([0.0] * 8, [0.1] * 6 + [-0.1] * 2)["p"] == 74 / 256
    assert (
        losses([0.0] * 5, [0.1, 0.1, 0.1, 0.3, -0.1])["p"] == 10 / 32
    )  # all seven tenths but one: ties only up to rounding
    with pytest.raises(ValueError, match="8 and 6 windows"):
        losses(zeros, zeros[:6])
    with pytest.raises(ValueError, match="not finite"):
        losses([3.0, None], [3.0, 3.0])


def test_many_windows_take_the_t_test():
    from scipy.stats import ttest_rel

    generator = random.Random(1)
    a = [generator.gauss(3, 1) for _ in range(21)]
    b = [x + generator.gauss(0.05, 0.1) for x in a]
    assert losses(a, b)["p"] == pytest.approx(ttest_rel(b, a).pvalue)
    assert losses(a, b)["p"] == pytest.approx(
        losses(a[:20], b[:20])["p"], abs=0.05
    )  # no jump where the test changes


@pytest.mark.parametrize("n", [1, 8, 20, 21, 145])
def test_a_run_against_itself(n):
    same = [3.0 + i / 7 for i in range(n)]
    found = losses(same, same)
    assert (found["p"], found["ratio"], found["difference"]) == (1, 1, 0)


def test_compare_reads_what_both_runs_keep(root):
    a, b = (
        row(Run(root / name))
        for name in ("tiny-nvfp4-identity-gptq-aaaaaaaaa1", "tiny-nvfp4-hadamard-rtn-aaaaaaaaa2")
    )
    found = compare(a, b)
    assert found["corpora"]["wikitext-2"]["difference"] == pytest.approx(0.3)
    assert found["corpora"]["wikitext-2"]["p"] == 2 / 256
    answers = found["tasks"]["arc_easy"]
    assert (answers["metric"], answers["n"], answers["won"]) == ("acc_norm", 40, 0)
    assert answers["lost"] > 5 and answers["p"] == pytest.approx(2 * 0.5 ** answers["lost"])
    assert {p["p"] for kind in compare(a, a).values() for p in kind.values()} == {1}
    other = row(Run(stored(root, "tiny-nvfp4-identity-rtn-aaaaaaaaa5", windows=6)))
    assert "8 and 6 windows" in compare(a, other)["corpora"]["pydoc"]["error"]
    b["stages"]["quantized"]["tokens"] //= 2
    assert "windows of 2048 and of 1024 tokens" in compare(a, b)["corpora"]["pydoc"]["error"]


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


def told(*runs: tuple[dict, dict]) -> list[str]:
    """What tells runs apart, from ({group: option}, {dotted key: value}) of each."""
    return apart([{"choices": choices} for choices, _ in runs], [settings for _, settings in runs])


def test_points_of_a_sweep_are_told_apart():
    int4, nvfp4 = {"format": "int4"}, {"format": "nvfp4"}
    sizes = [
        (int4, {"format.weight.group_size": size, "seed": "0"}) for size in ("32", "64", "128")
    ]
    assert told(*sizes) == [f"weight.group_size={size}" for size in (32, 64, 128)]
    assert told(*sizes, (nvfp4, {"format.weight.group_size": "16", "seed": "1"})) == [
        *(f"weight.group_size={size}" for size in (32, 64, 128)),
        "seed=1",
    ]  # an option's own settings follow from it
    assert told(*sizes[:1] * 2, *sizes[1:2]) == ["", "", "weight.group_size=64"]
    assert told(sizes[0]) == told((int4, {}), (int4, {"seed": "1"}))[:1] == [""]


def test_what_tells_runs_apart_names_what_one_would_type():
    alike = {
        "format.weight.bits": "4",
        "format.act.bits": "4",
        "transform.r1.lr": "0.1",
        "format.overrides": "null",
    }
    other = {
        "format.weight.bits": "3",
        "format.act.bits": "4",
        "transform.r1.lr": "0.2",
        "format.overrides.lm_head": "8",
    }
    assert told(({}, alike), ({}, other)) == [
        "overrides.lm_head=null weight.bits=4 r1.lr=0.1",
        "overrides.lm_head=8 weight.bits=3 r1.lr=0.2",
    ]
    same = [({}, {"a.x.lr": value, "b.x.lr": value}) for value in "12"]
    assert told(*same) == [
        "a.x.lr=1 b.x.lr=1",
        "a.x.lr=2 b.x.lr=2",
    ]  # two keys of one ending are written out
    silent = (
        {"tracking": "local"},
        {
            "run_root": "a",
            "tracking.name": "b",
            "force": "true",
            "on_error": "raise",
            "model.trust_remote_code": "false",
        },
    )
    assert told(({}, {"seed": "0"}), (silent[0], silent[1] | {"seed": "0"})) == ["", ""]
    texts = [
        ({"data": data, "eval": "perplexity"}, {"data.path": path, "seed": "0"})
        for data, path in (("text", "/a"), ("text", "/b"), ("pydoc", "null"))
    ]
    assert told(*texts) == ["data.path=/a", "data.path=/b", "data=pydoc"]
    recipes = [
        ({"recipe": recipe, "solver": "gptq"}, {"solver.order": order, "solver.damp": damp})
        for recipe, order, damp in (("a", "x", "1"), ("b", "y", "1"), ("b", "y", "2"))
    ]
    # what a recipe brings with it follows from it
    assert told(*recipes) == ["recipe=a", "solver.damp=1", "solver.damp=2"]


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


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["show", "aaaaaaaaa"], ["2 runs match", "gptq-aaaaaaaaa1", "rtn-aaaaaaaaa2"]),
        (["show", "zzz"], ["zzz: no such run", "bbbbbbbbb4"]),
        (["diff", "aaaaaaaaa1", "int4"], ["2 runs match", "bbbbbbbbb3", "bbbbbbbbb4"]),
        (["ls", "frmat=int4"], ["frmat=int4: no such filter", "format"]),
        (["prune", "--yes", "sttus=failed"], ["sttus=failed: no such filter"]),
        (["ls", "--sort", "size"], ["--sort size", "ppl wikitext-2"]),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(root, capsys, words, names):
    command, *rest = words
    assert main([command, str(root), *rest]) == 2
    got = capsys.readouterr()
    assert got.out == "" and len(got.err.splitlines()) == 1
    assert all(name in got.err for name in names)
    assert len(list(root.glob("tiny*"))) == 4


def test_no_run_root_and_no_such_command(tmp_path, capsys):
    assert main(["ls", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err
    for words in (["remove"], [], ["ls", "--verbose"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)


def test_show(root, capsys):
    assert main(["show", str(root), "aaaaaaaaa1"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "python run.py solver=gptq seed=0",
        "quantized",
        " 0.1000 ",
        " 83.0 ",
        "warning: [careful]",
        "mark wikitext-2: same corpus as calibration; first 8 of 145 windows",
        "layers.8.q_proj",
        "0.080000",
        "layer 3 down_in",
        "30.0 -> 4.0",
        "layer 0 down_in",
        "0.0 -> 7.0",
        "312.0 -> 3.0",
    ):
        assert text in shown
    assert "layers.3.q_proj" not in shown and "traceback" not in shown
    assert main(["show", str(root), "bbbbbbbbb3"]) == 0
    shown = capsys.readouterr().out
    assert "failed in stage solve: RuntimeError: first\nthe last [line]" in shown
    assert f"traceback is in {root / 'tiny-int4-identity-gptq-bbbbbbbbb3' / 'status.json'}" in shown


def test_diff(root, capsys):
    other = root / "tiny-nvfp4-hadamard-rtn-aaaaaaaaa2"
    write(other / "config.yaml", "seed: 0\nsolver: {name: rtn, tasks: ['[a]', b], damp: 0.5}\n")
    assert main(["diff", str(root), "aaaaaaaaa1", "aaaaaaaaa2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in lines
        if "│" in line
    }
    assert (cells["solver.name"], cells["solver.damp"], cells["run_root"]) == (
        ["gptq", "rtn"],
        ["-", "0.5"],
        ["r", "-"],
    )
    assert "seed" not in cells and "solver.tasks" not in cells
    assert cells["KL wikitext-2"] == ["0.1000", "0.4000", "+0.3000"]
    assert cells["wikitext-2"][:4] == [
        "8",
        "+0.30000 ± 0.00000",
        f"{math.exp(0.3):.4f}",
        "0.007812",
    ]
    assert (
        cells["arc_easy"][:3] == ["acc_norm", "40", "100.0"] and float(cells["arc_easy"][-1]) < 0.05
    )
    assert main(["diff", str(root), "aaaaaaaaa1", "aaaaaaaaa1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    p = [line.split("│") for line in lines if line.startswith(("│ wikitext-2", "│ arc_easy"))]
    assert [cells[5].strip() for cells in p[:1]] + [cells[-2].strip() for cells in p[1:]] == [
        "1",
        "1",
    ]


def test_failed(root, capsys):
    assert main(["failed", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "the last [line]" in shown and "RuntimeError" not in shown and "aaaaaaaaa" not in shown
    assert (
        "bbbbbbbbb3: python run.py solver=gptq seed=0\n"
        "bbbbbbbbb4: python run.py solver=rtn seed=0\n" in shown
    )


def files(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_prune_lists_and_then_removes(root, capsys):
    os.link(
        root / "tiny-int4-identity-gptq-bbbbbbbbb3/blocks/0000.safetensors",
        root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/blocks/0001.safetensors",
    )
    before = files(root)
    assert main(["prune", str(root)]) == 0
    listed = capsys.readouterr().out
    assert "2 to remove, 2.0 MB" in listed and "--yes" in listed  # the linked block frees nothing
    assert files(root) == before
    with locked(root / "tiny-int4-identity-rtn-bbbbbbbbb4/lock"):  # held: it runs
        assert main(["prune", str(root), "--yes"]) == 0
        assert "bbbbbbbbb4" not in capsys.readouterr().out
    assert files(root) == {name for name in before if "bbbbbbbbb3" not in name}
    assert (
        root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/blocks/0001.safetensors"
    ).stat().st_size == 2_000_000
    assert main(["prune", str(root), "solver=gptq", "--yes", "--blocks"]) == 0
    gone = {"bbbbbbbbb3", "aaaaaaaaa1/blocks"}
    assert files(root) == {name for name in before if not any(part in name for part in gone)}
    assert sorted(path.name for path in root.glob("_*")) == ["_shared"]
    assert main(["show", str(root), "aaaaaaaaa1"]) == 0


def test_prune_leaves_a_run_that_is_tried_again(root, capsys):
    """Its status still says failed, but a process has taken the lock."""
    before = files(root)
    with locked(root / "tiny-int4-identity-gptq-bbbbbbbbb3/lock"):
        assert main(["prune", str(root), "status=failed", "--yes"]) == 0
    assert "bbbbbbbbb3: left alone" in capsys.readouterr().out
    assert files(root) == before


def test_prune_leaves_a_run_that_ended_since_it_was_listed(root, capsys, monkeypatch):
    run, before = Run(root / "tiny-int4-identity-gptq-bbbbbbbbb3"), files(root)
    listed = terminal.freed

    def meanwhile(targets):
        run.set_status(status="done")
        return listed(targets)

    monkeypatch.setattr(terminal, "freed", meanwhile)
    assert terminal.main(["prune", str(root), "status=failed", "--yes"]) == 0
    assert "bbbbbbbbb3: left alone" in capsys.readouterr().out
    assert files(root) == before


def test_prune_follows_no_links(root, tmp_path):
    outside = stored(tmp_path / "elsewhere", "tiny-int4-identity-gptq-ccccccccc6", "failed")
    (root / outside.name).symlink_to(outside)
    for name in ("tiny-nvfp4-identity-gptq-aaaaaaaaa1", "tiny-int4-identity-gptq-bbbbbbbbb3"):
        (root / name / "blocks").rename(root / name / "own")
        (root / name / "blocks").symlink_to(outside / "blocks")
    kept = files(tmp_path / "elsewhere")
    assert main(["prune", str(root), "--yes", "--blocks"]) == 0
    assert files(tmp_path / "elsewhere") == kept
    assert (root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1/blocks").is_symlink()
    assert not (root / "tiny-int4-identity-gptq-bbbbbbbbb3").exists()


def test_prune_keeps_finished_figures_whose_status_is_lost(root):
    path = root / "tiny-nvfp4-identity-gptq-aaaaaaaaa1"
    write(path / "status.json", '{"status": "do')
    assert main(["prune", str(root), "--yes"]) == 0
    assert (path / "metrics.json").is_file()


@pytest.mark.parametrize(
    "line", ["ls --sort ppl", "failed", "prune --yes --blocks", "show ddd", "diff ddd a1"]
)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", ""),
        ("status.json", "[1]"),
        ("metrics.json", '{"run_'),
        ("metrics.json", "[]"),
        ("metrics.json", None),
        (
            "metrics.json",
            '{"stages": null, "choices": null, "layers": null, "marks": 3, "seconds": null}',
        ),
        (
            "metrics.json",
            '{"status": "failed",'
            ' "stages": {"baseline": {"ppl": {"pydoc": null}}, "quantized": {}}}',
        ),
        (
            "metrics.json",
            '{"choices": {"format": 3, "solver": [], "data": {}}, "holds": {"solver": []}}',
        ),
        ("config.yaml", "a: [1"),
        ("config.yaml", None),
        ("config.yaml", "[7]"),
        ("outliers.json", "{"),
        ("samples/quantized/arc_easy.json", "[{}]"),
    ],
    ids=str,
)
def test_broken_runs_never_crash(root, capsys, name, content, line):
    path = stored(root, "tiny-nvfp4-identity-gptq-ddddddddd9")
    (path / name).unlink() if content is None else write(path / name, content)
    command, *rest = line.split()
    assert main([command, str(root), *rest]) == 0
    assert capsys.readouterr().out


def test_a_perplexity_that_is_not_finite_is_shown(root, capsys):
    path = stored(
        root,
        "tiny-nvfp4-identity-gptq-ddddddddd9",
        "failed",
        error="FloatingPointError: not finite",
    )
    metrics = json.loads((path / "metrics.json").read_text())
    write_json(
        path / "metrics.json",
        metrics | {"stages": metrics["stages"] | {"quantized": {"ppl": {"pydoc": math.nan}}}},
    )
    assert main(["show", str(root), "ddddddddd9"]) == 0
    assert "nan" in capsys.readouterr().out


def test_page(root, capsys):
    pytest.importorskip("harness.report.page")
    out = root.parent / "page.html"
    assert main(["page", str(root), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "aaaaaaaaa1" in out.read_text()
