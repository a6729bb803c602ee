"""Losses from vLLM beside a run's own, with a script in the engine's place; what the engine refuses
costs no work and is tried again."""

import json
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
from composed import small
from test_checkpoint import WINDOW

from harness.config.errors import ConfigError
from harness.evaluation.vllm import VLLM
from harness.pipeline.job import execute


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["format=nvfp4"], "export=none: vLLM loads a checkpoint"),
        (["format=int4", *WINDOW, "export=harness"], "format.kv.window=32"),
        (["eval.evaluations.vllm.python=/nowhere/python"], "make vllm"),
        (["eval.evaluations.vllm.dtype=int8"], "eval.evaluations.vllm.dtype=int8"),
        (["eval.evaluations.vllm.windows=0"], "eval.evaluations.vllm.windows"),
    ],
)
def test_a_run_is_refused_before_weights(overrides, error, tmp_path):
    run = ["eval=vllm", f"eval.evaluations.vllm.python={sys.executable}", "solver=rtn", *overrides]
    with pytest.raises(ConfigError, match=re.escape(error)):
        execute(*small(tmp_path, *run))


def program(path: Path, code: str) -> str:
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


UNIFORM = """
import json, math, sys
asked = json.load(open(sys.argv[2]))
losses = {c: [(len(w) - 1) * math.log(7) for w in ws] for c, ws in asked["windows"].items()}
json.dump({"losses": losses}, open(sys.argv[3], "w"))
"""


def test_its_figures_stand_beside_the_run_s_own(tmp_path):
    python = program(tmp_path / "uniform", UNIFORM)
    run = ["eval=vllm", f"eval.evaluations.vllm.python={python}", "format=int4", "solver=rtn"]
    run += ["eval.evaluations.vllm.windows=1", "export=harness", f"export.path={tmp_path / 'out'}"]
    outcome = execute(*small(tmp_path, *run))
    assert outcome.status == "done", outcome.error
    stages = outcome.metrics["stages"]
    found = stages["quantized"]["vllm"]["pydoc"]
    here = (
        torch.tensor(stages["quantized"]["losses"]["pydoc"][:1], dtype=torch.float64).mean().exp()
    )
    assert found["ppl"] == pytest.approx(7)
    assert found["here"] == pytest.approx(float(here))
    assert found["off"] == pytest.approx(7 / float(here) - 1)
    assert "vllm" not in stages["baseline"]
    assert {"vllm"} <= {record["evaluation"] for record in outcome.metrics["records"]}


def test_what_the_engine_refuses_is_tried_again_from_the_stored_blocks(tmp_path):
    python = program(tmp_path / "refuses", "raise SystemExit('no kernel for it')")
    run = ["eval=vllm", f"eval.evaluations.vllm.python={python}", "format=nvfp4", "solver=rtn"]
    run += ["export=harness", f"export.path={tmp_path / 'out'}"]
    failed = execute(*small(tmp_path, *run))
    assert failed.status == "failed" and failed.run.status["status"] == "failed"
    assert "eval=vllm: vLLM refuses" in failed.error and "no kernel for it" in failed.error
    assert "the same command tries this again" in failed.error
    stages = failed.run.metrics["stages"]
    assert stages["quantized"]["ppl"] and "vllm" not in stages["quantized"]
    assert Path(failed.run.metrics["export"]["path"]).is_dir()
    assert failed.run.metrics["bits_per_weight"]
    program(tmp_path / "refuses", UNIFORM)
    again = execute(*small(tmp_path, *run))
    assert (again.status, again.stored) == ("done", False), again.error
    assert again.metrics["stages"]["quantized"]["vllm"]["pydoc"]["ppl"] == pytest.approx(7)
    events = (again.run.path / "events.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "block" for line in events) == 2, "each solved once"
    assert left(tmp_path / "out") == [Path(again.metrics["export"]["path"]).name]
    assert execute(*small(tmp_path, *run)).stored


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_where_vllm_is_moves_no_run():
    one, other = VLLM(python="a/python"), VLLM(python="b/python")
    assert one.fingerprint() == other.fingerprint() != VLLM(windows=3).fingerprint()
