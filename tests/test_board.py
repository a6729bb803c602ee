"""The leaderboard, from the store alone."""

import math

from composed import small

from harness.pipeline.job import execute
from harness.report.__main__ import main
from harness.report.board import board, score
from harness.report.paired import losses
from harness.report.rows import last, rows


def test_runs_that_read_the_same_stand_in_one_table_best_first(tmp_path):
    for recipe, windows in (("rtn", 3), ("hessian", 3), ("gptq", 3), ("gptq", 2)):
        settings = [f"recipe={recipe}", f"eval.perplexity.windows={windows}"]
        assert execute(*small(tmp_path, *settings)).status == "done"
    root = tmp_path / "runs"
    found = rows(root)
    text = board(found)
    assert text.count("## ") == 1  # of the one that read two windows there is no other
    lines = [line.split(" | ") for line in text.splitlines() if "`" in line]
    order = [line[0].removeprefix("| ") for line in lines]
    by_recipe = {row["labels"]["recipe"]: row for row in found if _windows(row) == 3}
    assert order == sorted(by_recipe, key=lambda name: score(by_recipe[name]))
    first, second = (last(by_recipe[name])["losses"]["pydoc"] for name in order[:2])
    assert lines[0][-2] == f"{losses(first, second)['p']:.2g}"
    assert lines[-1][-2] == ""


def _windows(row):
    return len(last(row)["losses"]["pydoc"])


def test_the_score_is_the_mean_loss():
    row = {"status": "done", "stages": {"quantized": {"ppl": {"a": math.e, "b": math.e**3}}}}
    assert score(row) == 2
    row["stages"]["quantized"]["ppl"]["b"] = math.nan
    assert score(row) == math.inf


def test_it_is_written_by_one_command(tmp_path, capsys):
    for solver in ("rtn", "gptq"):
        execute(*small(tmp_path, f"solver={solver}"))
    out = tmp_path / "BOARD.md"
    assert main(["board", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert out.read_text().startswith("# Leaderboard")
    assert "| solver |" in out.read_text()
    assert main(["board", str(tmp_path / "runs"), "solver=rtn"]) == 0
    assert "No two finished runs" in capsys.readouterr().out


def test_what_is_kept_of_runs_gives_the_board_that_they_gave(tmp_path, capsys):
    """And the files of others, of which a failed one has no figure, do not come along."""
    for words in (["solver=rtn"], ["solver=gptq"], ["solver=rtn", "format=mxfp4"]):
        assert execute(*small(tmp_path, *words)).status == "done"
    root, kept = tmp_path / "runs", tmp_path / "kept"
    (root / "tiny-nvfp4-identity-rtn-0123456789").mkdir()
    (root / "tiny-nvfp4-identity-rtn-0123456789" / "status.json").write_text('{"status": "failed"}')
    for path in root.glob("tiny-*/config.yaml"):
        path.write_text(path.read_text() + "api_key: hunter2\n")
    assert main(["keep", str(root), "format=nvfp4", "--into", str(kept)]) == 0
    assert "2 runs are kept" in capsys.readouterr().out
    chosen = [row for row in rows(root) if row["labels"]["format"] == "nvfp4"]
    assert board(rows(kept)) == board(chosen)
    assert sorted({path.name for path in kept.rglob("*.*")}) == sorted(
        {"config.yaml", "metrics.json", "status.json"}
    )
    assert all("hunter2" not in path.read_text() for path in kept.rglob("config.yaml"))
    assert all("host" not in path.read_text() for path in kept.rglob("status.json"))


def test_runs_that_only_the_seed_tells_apart_share_a_row(tmp_path):
    quarot = ["transform=quarot", "solver=rtn"]
    for settings in (["solver=rtn"], [*quarot, "seed=0"], [*quarot, "seed=1"]):
        assert execute(*small(tmp_path, *settings)).status == "done"
    found = rows(tmp_path / "runs")
    cells = [line.strip("| ").split(" | ") for line in board(found).splitlines() if "`" in line]
    assert sorted(line[0] for line in cells) == ["identity", "quarot"]
    turned = [row for row in found if row["labels"]["transform"] == "quarot"]
    first, second = (last(row)["ppl"]["pydoc"] for row in turned)
    assert first != second
    shared = next(line for line in cells if line[0] == "quarot")
    spread = abs(first - second) / math.sqrt(2)
    assert f"{(first + second) / 2:.3f} ± {spread:.3f}" in shared
    assert shared[-1] == ", ".join(f"`{row['run_id'].rsplit('-', 1)[1]}`" for row in turned)
    other = next(row for row in found if row["labels"]["transform"] == "identity")
    each = [last(row)["losses"]["pydoc"] for row in turned]
    mean = [(a + b) / 2 for a, b in zip(*each)]
    assert cells[0][-2] == f"{losses(mean, last(other)['losses']['pydoc'])['p']:.2g}"


def test_a_run_whose_windows_cannot_be_paired_has_its_row(tmp_path):
    for settings in (["solver=rtn"], ["solver=gptq"]):
        execute(*small(tmp_path, *settings))
    found = rows(tmp_path / "runs")
    last(found[0])["losses"]["pydoc"][0] = math.inf
    lines = [line for line in board(found).splitlines() if "`" in line]
    assert len(lines) == 2
    assert all(line.split(" | ")[-2] == "" for line in lines)
