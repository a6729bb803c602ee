"""Whole runs on the tiny model: every format with every solver, every family, every option, and
what a run leaves alone."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from composed import NEAR, ROOT, divergence, run, small

from harness.config.build import build, option
from harness.config.errors import ConfigError
from harness.formats import Format
from harness.pipeline.job import execute
from harness.solvers import Solver
from harness.transforms import Rotation

# those of a cache alone leave no weight to a solver: test_window.py
WEIGHTS = {
    path.stem: build(option("format", path.stem)["weight"], "format.weight", Format)
    for path in sorted((ROOT / "conf" / "format").glob("*.yaml"))
}
FORMATS = [name for name, weight in WEIGHTS.items() if weight is not None]
SOLVERS = sorted(
    path.stem for path in (ROOT / "conf" / "solver").glob("*.yaml") if path.stem != "none"
)
QUICK = {
    "adascale": ["solver.iterations=2"],
    "adascale_paper": ["solver.iterations=2"],
    "awq": ["solver.grid=3"],
    "faar": ["solver.steps=2"],
    "signround": ["solver.steps=2"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where runs find what others have of the same model and text: tokens, the untouched model's
    figures, what it reads."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_with_every_solver(store, format, solver):
    words = [f"format={format}", f"solver={solver}", *QUICK.get(solver, [])]
    weight = WEIGHTS[format]
    settings = option("solver", solver)
    try:
        build({k: v for k, v in settings.items() if k != "name"}, "solver", Solver).check(weight)
    except ConfigError as refusal:  # of two lattices, or of zero points, by some solvers
        with pytest.raises(ConfigError, match=re.escape(str(refusal))):
            run(store, *words)
        return
    outcome = run(store, *words)
    assert not outcome.stored
    metrics = json.loads((outcome.run.path / "metrics.json").read_text())
    assert outcome.status == metrics["status"] == "done"
    assert {
        "run_id",
        "quant_id",
        "choices",
        "stages",
        "bits_per_weight",
        "seconds",
        "peak_memory_mb",
        "layers",
    } <= set(metrics)
    base, quantized = (metrics["stages"][stage] for stage in ("baseline", "quantized"))
    assert list(base["ppl"]) == ["pydoc"]
    assert base["tokens"] == 256
    assert 0 < divergence(metrics) < NEAR
    assert quantized["ppl"] != base["ppl"]
    assert len(metrics["layers"]) == 14
    # of format=auto, which may give a linear that hardly matters two bits, the mean
    errors = [layer["rel_error"] for layer in metrics["layers"]]
    error = fmean(errors) if format == "auto" else max(errors)
    assert min(errors) > 0
    assert error < 0.1 * 4.0 ** max(0, 4 - weight.bits), "a bit less is four times the noise"
    # a scale and a zero point of 32 bits are the most that a group has, and one scale a tensor
    most = weight.bits + 64 / weight.group(192) + 0.01
    assert weight.bits < metrics["bits_per_weight"] < most


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("transform", ["identity", "hadamard"])
def test_every_family(tmp_path, family, transform):
    signs = ["transform.random_signs=true"] if transform == "hadamard" else []
    int4 = ["format=int4", "format.weight.group_size=32"]
    outcome = run(tmp_path, f"model.family={family}", f"transform={transform}", *int4, *signs)
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


def test_hadamard_keeps_the_function(tmp_path):
    outcome = run(
        tmp_path, "format=none", "solver=none", "transform=hadamard", "transform.block_size=full"
    )
    stages = outcome.metrics["stages"]
    assert stages["transformed"]["ppl"]["pydoc"] == pytest.approx(
        stages["baseline"]["ppl"]["pydoc"], rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_fold_is_stopped_by_the_gate(tmp_path, monkeypatch, dtype):
    """Paley matrices are not symmetric: absorbing R^T instead of R changes the model, and the run
    says so."""
    monkeypatch.setattr(
        Rotation, "absorb", lambda self, weight: self.matrix.apply_transpose(weight)
    )
    settings = [
        "format=none",
        "solver=none",
        "transform=hadamard",
        "transform.block_size=12",
        f"model.dtype={dtype}",
    ]
    outcome = run(tmp_path, *settings)
    assert outcome.status == "failed"
    assert "changed the model" in outcome.error
    assert outcome.run.status["status"] == "failed"
    monkeypatch.undo()
    mended = run(tmp_path, *settings)
    assert mended.status == "done"
    assert "error" not in mended.run.status


def test_untouched_model(tmp_path):
    metrics = run(tmp_path, "format=none", "solver=none").metrics
    assert list(metrics["stages"]) == ["baseline"]
    assert metrics["bits_per_weight"] == 32


def test_activations_alone_and_weights_alone(tmp_path):
    both = run(tmp_path, "format=nvfp4", "solver=rtn").metrics["stages"]["quantized"]["ppl"][
        "pydoc"
    ]
    weights = run(tmp_path, "format=nvfp4", "solver=rtn", "format.act.bits=16").metrics["stages"][
        "quantized"
    ]["ppl"]["pydoc"]
    acts = run(tmp_path, "format=nvfp4", "solver=none", "format.weight.bits=16").metrics["stages"][
        "quantized"
    ]["ppl"]["pydoc"]
    assert len({both, weights, acts}) == 3


OPTIONS = [
    "solver.sequencing=block",
    "solver.hessian_input=quantized",
    "solver.order=activation",
    "solver.scales=dynamic",
    "format.weight.observer=mse",
    "model.dtype=bfloat16",
    "model.amp=bfloat16",
    "data.calibration.order=random",
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_and_has_its_own_result(tmp_path, option):
    plain, other = run(tmp_path), run(tmp_path, option)
    assert other.status == "done", other.error
    assert other.metrics["run_id"] != plain.metrics["run_id"]
    assert (
        other.metrics["stages"]["quantized"]["ppl"] != plain.metrics["stages"]["quantized"]["ppl"]
    )


def test_home_folders_in_option_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cfg, choices = small(tmp_path, "export=harness", "export.path='~/out'", "run_root='~/runs'")
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    assert outcome.run.path.parent == tmp_path / "home" / "runs"
    assert Path(outcome.metrics["export"]["path"]).parent == tmp_path / "home" / "out"
    assert not (tmp_path / "~").exists()
    assert execute(cfg, choices).stored
    cfg.run_root = "~nobody-of-that-name/runs"
    with pytest.raises(ConfigError, match=r"\./~nobody-of-that-name"):
        execute(cfg, choices)


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    run(
        tmp_path,
        "transform=hadamard",
        "transform.random_signs=true",
        "data.calibration.order=random",
    )
    assert torch.equal(torch.random.get_rng_state(), before)
