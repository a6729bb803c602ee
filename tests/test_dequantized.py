"""Plain Hugging Face checkpoints of dequantized weights: every tensor under the name and in the
shape that transformers saves it, equal to Q(W) in every bit, loaded without this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from composed import small
from composites import compose
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.config.errors import ConfigError
from harness.formats import Integer
from harness.models.adapter import structure_of
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute

INT8 = ["format=int8", "format.weight.granularity=channel", "format.weight.group_size=null"]
WEIGHTS = [*INT8, "format.act.bits=16", "solver=rtn"]
# Torch's linears, matrices [in, out], experts that files hold one by one, and all in one turned.
ARCHITECTURES = ["qwen3", "gpt2", "mixtral", "gpt_oss"]
LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(256).view(2, 128)
found = {}
for folder in sys.argv[2:]:
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found[folder] = dict(model.named_parameters()), model.eval()(ids).logits
assert "harness" not in sys.modules
torch.save(found, sys.argv[1])
"""


def run(tmp_path, *words):
    place = ["export=dequantized", f"export.path={tmp_path / 'out'}"]
    outcome = execute(*small(tmp_path, *place, *words), command="python run.py again")
    assert outcome.status == "done", outcome.error
    return outcome, Path(outcome.metrics["export"]["path"])


def quantized(model) -> dict[str, torch.Tensor]:
    """{parameter: what it is once its matrices are rounded, one by one}, the embedding apart."""
    rounded = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for sites in structure_of(model.config).sites:
        for matrix in (matrix for site in sites for matrix in site.matrices if matrix.quantize):
            whole = rounded[matrix.parameter]
            for weight in whole if matrix.experts else [whole]:
                held = weight.T if matrix.reads == (1 if matrix.experts else 0) else weight
                held.copy_(absmax(held.contiguous()))
    return rounded


def absmax(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric 8-bit integers [out, in], a scale a row."""
    format = Integer(bits=8, granularity="channel", group_size=None)
    return format.quantize(weight).dequantize()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{architecture: (the model as it was, its folder, the checkpoint's, what plain transformers
    finds there)}"""
    root = tmp_path_factory.mktemp("plain")
    made = {}
    for name in ARCHITECTURES:
        model, folder = zoo.make(name), root / name / "model"
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        made[name] = model, folder, *run(root / name, "model=hf", f"model.path={folder}", *WEIGHTS)
    (root / "loader.py").write_text(LOADER)
    outside = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    folders = [str(out) for *_, out in made.values()]
    command = [sys.executable, "loader.py", "found.pt", *folders]
    done = subprocess.run(command, cwd=root, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(root / "found.pt")
    return {name: (*each, *found[str(each[-1])]) for name, each in made.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_transformers_gets_every_weight_in_every_bit(exported, name):
    model, _, outcome, _, parameters, _ = exported[name]
    wanted = quantized(model)
    assert parameters.keys() == wanted.keys()
    differ = [name for name, weight in wanted.items() if not torch.equal(weight, parameters[name])]
    assert differ == []
    touched = sum(not torch.equal(wanted[n], weight) for n, weight in model.named_parameters())
    assert touched >= 3 * 2 and outcome.metrics["export"]["weights"] >= touched


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_file_is_one_that_transformers_would_have_saved(exported, name):
    _, folder, _, out, *_ = exported[name]
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["use_cache"]
    assert (
        config["architectures"] == json.loads((folder / "config.json").read_text())["architectures"]
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_computes_what_was_evaluated(exported, name):
    model, _, outcome, _, _, logits = exported[name]
    for parameter, weight in quantized(model).items():
        model.get_parameter(parameter).copy_(weight)
    assert torch.equal(model(torch.arange(256).view(2, 128)).logits, logits)
    for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
        exact = 1e-5 if "mixtral" in name or "oss" in name else 0  # experts add up in another order
        assert loaded == pytest.approx(evaluated, rel=exact)


MERGED = {
    "quarot": ["transform=quarot", "transform.r4=off"],
    "gptq": ["solver=gptq"],
    "smoothquant": ["transform=smoothquant", "solver=gptq"],
    "adacodec": ["transform=adacodec", "transform.steps=1", "transform.placement=merged"],
    "head": ["format.overrides={lm_head: {weight: int8}, embed_tokens: {weight: int8}}"],
}


@pytest.mark.parametrize("case", MERGED)
def test_what_is_merged_is_measured_again_as_a_plain_model(tmp_path, case):
    learns = ["format.act.bits=4"] if case == "adacodec" else []
    outcome, folder = run(tmp_path, "format=nvfp4", "format.act.bits=16", "solver=rtn", *learns,
                          *MERGED[case])  # fmt: skip
    cfg, choices = small(
        tmp_path / "again", "model=hf", f"model.path={folder}", "format=none", "solver=none"
    )
    again = execute(cfg, choices)
    assert again.status == "done", again.error
    (compared,) = outcome.metrics["export"]["ppl"].values()
    assert compared[0] == compared[1] == again.metrics["stages"]["baseline"]["ppl"]["pydoc"]
    if not learns:
        evaluated = outcome.metrics["stages"]["quantized"]
        assert again.metrics["stages"]["baseline"]["losses"] == evaluated["losses"]


def test_it_has_the_dtype_of_the_evaluation(tmp_path):
    outcome, folder = run(tmp_path, *WEIGHTS, "model.dtype=bfloat16")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
        assert loaded == evaluated


def test_blocks_on_disk_give_the_same_file(tmp_path):
    folder = tmp_path / "model"
    zoo.make("mixtral").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    first, second = (
        load_file(run(tmp_path / where, "model=hf", f"model.path={folder}", *WEIGHTS,
                      f"model.weights={where}")[1] / "model.safetensors")
        for where in ("memory", "disk")
    )  # fmt: skip
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_stands_beside_a_text_decoder_is_as_it_was(tmp_path):
    folder, model = tmp_path / "model", compose("gemma3")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    outcome, out = run(tmp_path, "model=hf", f"model.path={folder}", *WEIGHTS)
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == outcome.metrics["export"]["weights"]
    assert not any(structure_of(model.config).beside(name) for name in changed)


def test_activations_and_cache_are_floats_there_and_that_is_said(tmp_path):
    """The figures are with them quantized, the file is not: both are told, and the file is held to
    the weights alone."""
    settings = ["format=int4", "format.kv.bits=4", "solver=rtn"]
    outcome, folder = run(tmp_path / "both", *settings)
    alone, _ = run(tmp_path / "alone", *settings, "format.act.bits=16", "format.kv.bits=16")
    assert any("whoever loads it reads activations" in line for line in outcome.metrics["warnings"])
    assert not any("export=dequantized" in line for line in alone.metrics["warnings"])
    told = "These files hold weights alone: the figures are with activations and KV cache quantized"
    assert told in (folder / "README.md").read_text()
    floats = alone.metrics["stages"]["quantized"]["ppl"]["pydoc"]
    assert outcome.metrics["export"]["ppl"]["pydoc"] == [floats, floats]
    assert outcome.metrics["stages"]["quantized"]["ppl"]["pydoc"] != floats
    mine, theirs = (
        load_file(Path(each.metrics["export"]["path"]) / "model.safetensors")
        for each in (outcome, alone)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "words",
    [
        ["transform=hadamard"],
        ["transform=quarot"],
        ["transform=pca"],
        ["transform=adacodec"],
        ["transform=quarot", "transform.r3=on", "transform.r4=off"],
    ],
    ids=" ".join,
)
def test_what_would_stay_online_is_refused_before_any_work(tmp_path, words):
    told = rf"{words[0]} with export=dequantized: .*would have to run online.*export=harness"
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, "format=nvfp4", "solver=rtn", *words)
    assert not (tmp_path / "runs").exists()
