"""Routed experts in the compressed-tensors layout: one by one under the names that engines know,
in every bit what was evaluated once plain transformers has loaded them; refused, before any weight
is read, where it would make others of them."""

import json
import re

import pytest
import torch
import zoo
from composed import small
from compressed import (
    G64,
    LOADER,
    NV,
    NV_ACT,
    logits,
    mx,
    perplexity,
    served_elsewhere,
    token,
    weight,
    written,
)
from safetensors import safe_open

from harness.checkpoints.base import weight_at
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.experts import parts_of
from harness.config.errors import ConfigError
from harness.formats import FP4, NVFP4, FourOverSix, Scheme
from harness.models.adapter import shape_of, structure_of
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute
from harness.transforms.identity import Identity

UNSCALED = NVFP4(global_scale="none")
FORMATS = {
    "nvfp4": (UNSCALED, "nvfp4-pack-quantized", {"packed", "scale", "global_scale"}),
    "mxfp4": (mx("e2m1"), "mxfp4-pack-quantized", {"packed", "scale"}),
    "mxfp6": (mx("e2m3"), "mxfp6-pack-quantized", {"packed", "scale"}),
    "int4": (G64, "pack-quantized", {"packed", "scale", "shape"}),
    "int4 of a tensor": (weight(4, "tensor"), "pack-quantized", {"packed", "scale", "shape"}),
    "int8": (weight(8), "pack-quantized", {"packed", "scale", "shape"}),
}
NAMED = {  # architecture: the names of an expert's parts, and of a router
    "qwen3_moe": (
        "model.layers.2.mlp.experts.3.",
        {"gate_proj": 64, "up_proj": 64, "down_proj": 128},
        "model.layers.2.mlp.gate",
    ),
    "mixtral": (
        "model.layers.2.block_sparse_moe.experts.3.",
        {"w1": 256, "w3": 256, "w2": 128},
        "model.layers.2.block_sparse_moe.gate",
    ),
    "deepseek_v3": (
        "model.layers.2.mlp.experts.3.",
        {"gate_proj": 64, "up_proj": 64, "down_proj": 128},
        "model.layers.2.mlp.gate",
    ),
}


def contents(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def quantization(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{format: (Made of a Qwen3-MoE, what a fresh process found)}"""
    root = tmp_path_factory.mktemp("experts")
    made = {
        name: written(root / str(i), zoo.make("qwen3_moe"), byte_tokenizer(), Scheme(weight=format))
        for i, (name, (format, *_)) in enumerate(FORMATS.items())
    }
    found = served_elsewhere(root, made.values())
    return {name: (each, found[str(each.folder)]) for name, each in made.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_a_fresh_process_gets_every_expert_as_evaluated(checkpoints, format):
    made, (differ, served, exact) = checkpoints[format]
    assert "weights[n]" in LOADER
    assert differ == [], "weights other than the evaluated ones in bfloat16"
    torch.testing.assert_close(exact, made.rounded, rtol=0, atol=1e-4)
    assert served.isfinite().all()
    evaluated = perplexity(made.exact)
    assert perplexity(served) == pytest.approx(evaluated, rel=CompressedTensors.tolerance)


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_names_experts_as_engines_do(checkpoints, format):
    made, _ = checkpoints[format]
    _, layout, entries = FORMATS[format]
    held = contents(made.folder)
    prefix, parts, _ = NAMED["qwen3_moe"]
    wanted = {f"{prefix}{part}.weight_{entry}" for part in parts for entry in entries}
    assert {name for name in held if name.startswith(prefix)} == wanted
    assert not [name for name in held if "gate_up" in name]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(3)]
    assert all(f"{router}.weight" in held for router in routers)
    config = quantization(made.folder)
    assert config["ignore"] == ["lm_head", *routers]
    (group,) = config["config_groups"].values()
    assert (group["targets"], group["format"]) == (["Linear"], layout)


@pytest.mark.parametrize("format", [*FORMATS, "fouroversix", "int3 asymmetric"])
def test_rows_of_a_weight_keep_their_codes_and_scales(format):
    """Gate and up of one matrix, each every second row of it in some architectures."""
    others = {"fouroversix": FourOverSix(), "int3 asymmetric": weight(3, symmetric=False)}
    kind = others[format] if format in others else FORMATS[format][0]
    q = kind.quantize(torch.randn(12, 64, generator=torch.Generator().manual_seed(1)))
    for rows in (range(6), range(6, 12), range(0, 12, 2), range(1, 12, 2), range(5, 6)):
        part = q.rows(rows)
        assert torch.equal(part.dequantize(), q.dequantize()[list(rows)])
        whole = q.scales.global_scale
        assert whole is None or torch.equal(part.scales.global_scale, whole)


@pytest.mark.parametrize("name", NAMED)
def test_other_experts_have_the_names_of_their_own_files(tmp_path, name):
    """Beside a head of another format, by which the group of experts has to say that it is theirs;
    DeepSeek's with a dense layer, shared experts and a router's bias."""
    model = zoo.make(name)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    head = {(None, "lm_head"): {"weight": weight(8), "act": None}}
    scheme = Scheme(weight=G64, overrides=head)
    made = written(tmp_path / "out", model, byte_tokenizer(), scheme)
    prefix, parts, router = NAMED[name]
    held = contents(made.folder)
    for part, rows in parts.items():
        assert held[f"{prefix}{part}.weight_shape"][0] == rows
    assert f"{router}.weight" in held
    config = quantization(made.folder)
    assert router in config["ignore"]
    experts, other = config["config_groups"].values()
    assert other["targets"] == ["lm_head"]
    patterns = [each.removeprefix("re:") for each in experts["targets"] if each.startswith("re:")]
    for part in (*parts, "gate_proj", "up_proj", "down_proj"):  # as vLLM calls those of any
        assert any(re.match(pattern, f"{prefix}{part}") for pattern in patterns)
    assert not any(re.match(pattern, router) for pattern in patterns)
    shared = [each for each in experts["targets"] if ".shared_experts." in each]
    assert bool(shared) is (name == "deepseek_v3")
    assert not any(re.match(pattern, each) for pattern in patterns for each in shared)
    exporter = CompressedTensors()
    loaded = exporter.load(made.folder, torch.device("cpu"), torch.float32)
    for linear, q in made.snapshot.qtensors.items():
        assert torch.equal(exporter.weight(loaded, linear), q.dequantize().bfloat16()), linear
    torch.testing.assert_close(logits(loaded), made.rounded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "lfm2_moe"])
def test_a_run_exports_experts_that_are_what_it_evaluated(tmp_path, name):
    """Shared ones beside them; layers without attention, dense ones before them."""
    zoo.make(name).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    run = small(
        tmp_path,
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "solver=rtn",
        "format=int8",
        "format.act.bits=16",
        "export=compressed_tensors",
        f"export.path={tmp_path / 'out'}",
    )
    outcome = execute(*run)
    assert outcome.status == "done", outcome.error
    exported = outcome.metrics["export"]
    assert exported["weights"] == len(outcome.metrics["layers"])
    for evaluated, loaded in exported["ppl"].values():
        assert loaded == pytest.approx(evaluated, rel=1e-6)


def test_what_a_router_adds_to_its_scores_keeps_its_dtype(tmp_path):
    """It chooses among experts by what bfloat16 would round away, and transformers keeps it."""
    model = zoo.make("deepseek_v3")
    biases = {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    assert biases
    for bias in biases.values():
        bias.copy_(torch.tensor([0.1, 0.1003, 0.1001, 0.1002]))
    made = written(tmp_path / "out", model, byte_tokenizer(), Scheme(weight=G64))
    loaded = CompressedTensors().load(made.folder, torch.device("cpu"), torch.bfloat16)
    found = dict(loaded.named_buffers())
    for name, bias in biases.items():
        assert torch.equal(found[name], bias), name


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4", "int8"])
def test_a_bfloat16_run_of_experts_is_what_is_loaded(tmp_path, format):
    scheme = Scheme(weight=FORMATS[format][0])
    model = zoo.make("qwen3_moe")
    made = written(tmp_path / "out", model, byte_tokenizer(), scheme, dtype=torch.bfloat16)
    loaded = CompressedTensors().load(made.folder, torch.device("cpu"), torch.bfloat16)
    for name, q in made.snapshot.qtensors.items():
        assert torch.equal(weight_at(loaded, name), q.dequantize())


MIXED = {(2, f"mlp.experts.gate_up_proj.{expert}"): {"weight": weight(8)} for expert in range(4)}
FLOAT = {
    (layer, f"mlp.experts.{name}.{expert}"): {"weight": None}
    for layer in range(3)
    for name in ("gate_up_proj", "down_proj")
    for expert in range(4)
}
REFUSED = {
    "a global scale": ("qwen3_moe", Scheme(weight=NV), "format.weight=NVFP4 of 4 bits"),
    "another one": ("qwen3_moe", Scheme(weight=FourOverSix()), "format.weight=FourOverSix"),
    "zero points": ("qwen3_moe", Scheme(weight=weight(symmetric=False)), "format.weight=Integer"),
    "codes of a byte": ("qwen3_moe", Scheme(weight=mx("e4m3")), "format.weight=MX of 8 bits"),
    "no such format": ("qwen3_moe", Scheme(weight=FP4()), "format.weight=FP4"),
    "inputs": ("qwen3_moe", Scheme(weight=weight(8), act=token()), "set format.act.bits=16"),
    "inputs in 4 bits": ("mixtral", Scheme(weight=NV, act=NV_ACT), "format.act.bits=4"),
    "inputs alone": ("qwen3_moe", Scheme(act=token()), "format.act.bits=8"),
    "two formats": (
        "qwen3_moe",
        Scheme(weight=G64, overrides=MIXED),
        "decodes all experts by one format",
    ),
    "float ones": (
        "qwen3_moe",
        Scheme(weight=G64, overrides=FLOAT),
        "takes experts to be quantized",
    ),
    "all in one tensor": (
        "gpt_oss",
        Scheme(weight=G64),
        "with a gpt_oss: its files hold no linear for mlp.experts.gate_up_proj.0 alone",
    ),
    "as many in one": ("granitemoe", Scheme(weight=G64), "hold no linear for"),
    "not swapped": ("llama4_text", Scheme(weight=G64), "feed_forward.experts.down_proj stay float"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_experts_that_would_come_back_as_others_are_refused(what):
    name, scheme, reason = REFUSED[what]
    context = shape_of(structure_of(zoo.config(name)), scheme)
    match = f"{re.escape(reason)}.* use export=harness"
    if reason.startswith("format"):
        match = f"^{re.escape(reason)}.* with export=compressed_tensors.* use export=harness"
    with pytest.raises(ConfigError, match=match):
        CompressedTensors().check(scheme, [Identity()], context)


def test_an_allocation_is_refused_before_anything_is_computed(tmp_path):
    """Each of its candidates alone would do; what it may give would not."""
    folder = tmp_path / "model"
    zoo.make("qwen3_moe").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    run = small(
        tmp_path,
        "model=hf",
        f"model.path={folder}",
        "format=auto",
        "format.act.bits=16",
        "format.weight.global_scale=none",
        "format.auto.candidates=[int4, mxfp4]",
        "format.auto.bits_per_weight=5",
        "export=compressed_tensors",
        f"export.path={tmp_path / 'out'}",
    )
    with pytest.raises(ConfigError, match=r"format\.auto .*decodes all experts by one format"):
        execute(*run)
    assert not list(tmp_path.glob("runs/*/metrics.json"))


def test_every_part_of_an_expert_is_some_rows_of_it_and_no_row_is_left():
    for name in NAMED:
        structure = structure_of(zoo.config(name))
        for linear, parts in parts_of(structure).items():
            rows = [row for _, part in parts for row in part]
            assert sorted(rows) == list(range(len(rows))), linear
            assert len(parts) == 1 + ("gate_up" in linear)
