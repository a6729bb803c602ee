"""Whole runs on the tiny model: every format with every solver, resumption bit for bit, the store, the gate."""

import json
import os
import shutil

import pytest
import torch
from composed import small

from harness import blockwise
from harness.errors import ConfigError, DataError
from harness.pipeline import execute
from harness.store import RunLocked, locked

FORMATS = ["nvfp4", "fouroversix", "mxfp4", "mxfp6", "mxfp8", "fp4", "int4", "int8"]


def run(tmp_path, *overrides):
    cfg, choices = small(tmp_path, *overrides)
    return execute(cfg, choices)


def numbers(metrics):
    return metrics["stages"], metrics["layers"], metrics["bits_per_weight"]


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_with_every_solver(tmp_path, format, solver):
    outcome = run(tmp_path, f"format={format}", f"solver={solver}")
    metrics = json.loads((outcome.run.path / "metrics.json").read_text())
    assert outcome.status == metrics["status"] == "done"
    assert {"run_id", "quant_id", "choices", "stages", "bits_per_weight", "seconds", "peak_memory_mb", "layers"} <= set(metrics)
    base, quantized = (metrics["stages"][stage] for stage in ("baseline", "quantized"))
    assert list(base["ppl"]) == ["pydoc"]
    assert base["tokens"] == 256
    assert quantized["ppl"]["pydoc"] == pytest.approx(base["ppl"]["pydoc"], rel=0.2)
    assert quantized["ppl"] != base["ppl"]
    assert len(metrics["layers"]) == 14
    assert all(0 < layer["rel_error"] < 0.1 and layer["sqnr_db"] > 10 for layer in metrics["layers"])
    assert 4 < metrics["bits_per_weight"] < 9


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("transform", ["identity", "hadamard"])
def test_every_family(tmp_path, family, transform):
    signs = ["transform.random_signs=true"] if transform == "hadamard" else []
    int4 = ["format=int4", "format.weight.group_size=32"]
    outcome = run(tmp_path, f"model.family={family}", f"transform={transform}", *int4, *signs)
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


def test_hadamard_keeps_the_function(tmp_path):
    outcome = run(tmp_path, "format=none", "solver=none", "transform=hadamard", "transform.block_size=full")
    stages = outcome.metrics["stages"]
    assert stages["transformed"]["ppl"]["pydoc"] == pytest.approx(stages["baseline"]["ppl"]["pydoc"], rel=1e-5)


def test_wrong_fold_is_stopped_by_the_gate(tmp_path, monkeypatch):
    """Paley matrices are not symmetric: absorbing R^T instead of R changes the model, and the run says so."""
    from harness.transforms import hadamard

    monkeypatch.setattr(hadamard.HadamardCodec, "absorb", lambda self, weight: self.rotation.apply_transpose(weight))
    outcome = run(tmp_path, "format=none", "solver=none", "transform=hadamard", "transform.block_size=12")
    assert outcome.status == "failed"
    assert "changed the model" in outcome.error
    assert json.loads((outcome.run.path / "status.json").read_text())["status"] == "failed"


def test_untouched_model(tmp_path):
    metrics = run(tmp_path, "format=none", "solver=none").metrics
    assert list(metrics["stages"]) == ["baseline"]
    assert metrics["bits_per_weight"] == 32


def test_activations_alone_and_weights_alone(tmp_path):
    both = run(tmp_path, "format=nvfp4", "solver=rtn").metrics["stages"]["quantized"]["ppl"]["pydoc"]
    weights = run(tmp_path, "format=nvfp4", "solver=rtn", "format.act.bits=16").metrics["stages"]["quantized"]["ppl"]["pydoc"]
    acts = run(tmp_path, "format=nvfp4", "solver=none", "format.weight.bits=16").metrics["stages"]["quantized"]["ppl"]["pydoc"]
    assert len({both, weights, acts}) == 3


OPTIONS = ["solver.sequencing=block", "solver.hessian_input=quantized", "solver.order=activation", "solver.scales=dynamic",
           "format.weight.observer=mse", "model.dtype=bfloat16", "model.amp=bfloat16", "data.calibration.order=random"]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_runs_and_has_its_own_result(tmp_path, option):
    plain, other = run(tmp_path), run(tmp_path, option)
    assert other.status == "done", other.error
    assert other.metrics["run_id"] != plain.metrics["run_id"]
    assert other.metrics["stages"]["quantized"]["ppl"] != plain.metrics["stages"]["quantized"]["ppl"]


def test_stored_result_is_shown_and_force_computes_again(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.stored
    assert again.metrics == json.loads((first.run.path / "metrics.json").read_text())
    forced = run(tmp_path, "force=true")
    assert not forced.stored
    assert numbers(forced.metrics) == numbers(first.metrics)


def test_baseline_is_computed_once(tmp_path):
    run(tmp_path, "solver=rtn")
    shared = list((tmp_path / "runs" / "_shared" / "baselines").glob("*.json"))
    assert len(shared) == 1
    before = shared[0].stat().st_mtime_ns
    other = run(tmp_path, "solver=gptq")
    assert shared[0].stat().st_mtime_ns == before
    assert other.metrics["stages"]["baseline"]["tokens"] == 256


def test_other_evaluation_reuses_the_blocks(tmp_path):
    first = run(tmp_path)
    other = run(tmp_path, "eval.perplexity.windows=3")
    assert first.metrics["quant_id"] == other.metrics["quant_id"]
    assert first.metrics["run_id"] != other.metrics["run_id"]
    assert other.metrics["layers"] == first.metrics["layers"]
    events = [json.loads(line)["event"] for line in (other.run.path / "events.jsonl").read_text().splitlines()]
    assert "block" not in events


@pytest.mark.parametrize("sequencing", ["sites", "block"])
@pytest.mark.parametrize("format", ["nvfp4", "int4", "mxfp4"])
def test_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, format, sequencing):
    settings = [f"format={format}", "transform=hadamard", f"solver.sequencing={sequencing}"]
    whole = run(tmp_path / "a", *settings)

    class Killed(Exception):
        pass

    settle, calls = blockwise._Block._settle, []

    def dies_in_the_second_block(self, *args):
        calls.append(self.index)
        if len(calls) == 7:
            raise Killed
        return settle(self, *args)

    monkeypatch.setattr(blockwise._Block, "_settle", dies_in_the_second_block)
    assert run(tmp_path / "b", *settings).status == "failed"
    monkeypatch.undo()
    resumed = run(tmp_path / "b", *settings)
    assert not resumed.stored
    assert numbers(resumed.metrics) == numbers(whole.metrics)
    shutil.rmtree(tmp_path)


def test_two_writers(tmp_path):
    cfg, choices = small(tmp_path)
    done = execute(cfg, choices)
    os.remove(done.run.path / "status.json")
    with locked(done.run.path / "lock"), pytest.raises(RunLocked, match="another process"):
        execute(cfg, choices)


def test_nan_in_a_weight_names_the_tensor(tmp_path):
    from harness.models.tiny import Tiny

    model, tokenizer = Tiny().load()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cfg, choices = small(tmp_path, "model=hf", f"model.path={tmp_path / 'model'}")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        execute(cfg, choices)


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    run(tmp_path, "transform=hadamard", "transform.random_signs=true", "data.calibration.order=random")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["format.weight.group_size=7"], ["format.weight.group_size"]),
        (["format=int4", "format.weight.group_size=100"], ["format.weight.group_size=100", "192"]),
        (["format.weight.bits=abc"], ["format.weight.bits", "abc"]),
        (["format.weight.symmetric=false"], ["symmetric"]),
        (["solver=none"], ["format.weight.bits", "solver"]),
        (["format=none"], ["format.weight.bits", "solver"]),
        (["solver.scales=dynamic", "solver.order=activation"], ["solver.scales", "solver.order"]),
        (["transform=hadamard", "transform.block_size=128"], ["transform.block_size=128", "64"]),
        (["seed=abc"], ["seed"]),
        (["device=gpu"], ["device=gpu"]),
        (["on_error=ignore"], ["on_error"]),
        (["data=text"], ["data.path"]),
        (["data=text", "data.path=/nowhere"], ["data.path=/nowhere"]),
        (["data.calibration.windows=0"], ["data.calibration.windows"]),
        (["eval.perplexity.length=100000"], ["eval.perplexity.length=100000"]),
        (["eval.perplexity.corpora=[pydok]"], ["pydok", "pydoc"]),
        (["model.dtype=float8"], ["model.dtype=float8"]),
        (["model.family=gpt2"], ["model.family=gpt2"]),
        (["model=hf", "model.path=/nowhere/at/all"], ["model.path"]),
        (["data.calibration.path=/nowhere.txt"], ["data.calibration.path"]),
        (["format.kv.bits=4"], ["format.kv"]),
        (["tracking.tags=a"], ["tracking.tags"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, overrides, names):
    cfg, choices = small(tmp_path, *overrides)
    with pytest.raises((ConfigError, DataError)) as caught:
        execute(cfg, choices)
    for name in names:
        assert name in str(caught.value)
    assert not (tmp_path / "runs").exists()
