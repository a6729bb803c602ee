"""The compressed-tensors checkpoint: plain transformers, in a process of its own, gets what was
evaluated; a run in the dtype it is served in comes back in every bit."""

import json
from dataclasses import replace

import pytest
import torch
from compressed import (
    CACHED,
    F8,
    F8_TENSOR,
    F8_TOKEN,
    G64,
    KV4,
    KV8,
    NV,
    NV_ACT,
    STATIC,
    logits,
    make,
    mx,
    perplexity,
    served_elsewhere,
    token,
    weight,
)
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open

from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.config.errors import ConfigError
from harness.formats import FourOverSix, KVCache, Scheme
from harness.models.adapter import shape_of
from harness.transforms import Placement
from harness.transforms.quarot import QuaRot

MIXED = {(i, "mlp.down_proj"): {"weight": weight(8), "act": token()} for i in range(2)} | {
    (0, "self_attn.o_proj"): {"weight": None, "act": None},
    (1, "mlp.up_proj"): {"weight": weight(3)},
    (None, "lm_head"): {"weight": weight(8), "act": None},
}
SCHEMES = {  # family, formats, the layout of the linears
    "nvfp4": ("qwen3", Scheme(weight=NV, act=NV_ACT), "nvfp4-pack-quantized"),
    "nvfp4 weights": ("llama", Scheme(weight=NV), "nvfp4-pack-quantized"),
    "fouroversix": ("llama", Scheme(weight=FourOverSix(), act=NV_ACT), "nvfp4-pack-quantized"),
    "mxfp4": (
        "qwen2",
        Scheme(weight=mx("e2m1", mx_scale="floor"), act=mx("e2m1", "activation")),
        "mxfp4-pack-quantized",
    ),
    "mxfp6": (
        "llama",
        Scheme(weight=mx("e2m3"), act=mx("e2m3", "activation")),
        "mxfp6-pack-quantized",
    ),
    "mxfp8": (
        "llama",
        Scheme(weight=mx("e4m3"), act=mx("e4m3", "activation", mx_even_mbits=1)),
        "mxfp8-quantized",
    ),
    "w4a16": ("mistral", Scheme(weight=G64), "pack-quantized"),
    "w4a16 asymmetric": ("qwen2", Scheme(weight=replace(G64, symmetric=False)), "pack-quantized"),
    "w4a4": ("qwen2", Scheme(weight=G64, act=token(4)), "pack-quantized"),
    "w4a8": ("qwen2", Scheme(weight=weight(), act=token()), "pack-quantized"),
    "w4a8 asymmetric": (
        "llama",
        Scheme(weight=replace(G64, symmetric=False), act=token()),
        "int-quantized",
    ),
    "w3a16 asymmetric": ("llama", Scheme(weight=weight(3, symmetric=False)), "pack-quantized"),
    "w8a8": ("qwen2", Scheme(weight=weight(8), act=token()), "int-quantized"),
    "w8a8 symmetric": (
        "llama",
        Scheme(weight=weight(8), act=token(symmetric=True, int_scale="half_range")),
        "int-quantized",
    ),
    "w8a8 static": (
        "llama",
        Scheme(weight=weight(8, "tensor", symmetric=False), act=STATIC),
        "int-quantized",
    ),
    "fp8": ("qwen2", Scheme(weight=F8, act=F8_TOKEN), "float-quantized"),
    "fp8 weights": ("llama", Scheme(weight=F8), "float-quantized"),
    "fp8 static": (
        "mistral",
        Scheme(
            weight=replace(F8, granularity="tensor"),
            act=replace(F8_TENSOR, range="static"),
        ),
        "float-quantized",
    ),
    "fp8 unit": (
        "llama",
        Scheme(
            weight=replace(F8, granularity="tensor", range="unit"),
            act=replace(F8_TENSOR, range="unit", scale_dtype="float32"),
        ),
        "float-quantized",
    ),
    "fp8 block": (  # 192 columns and 384 rows: the last squares of 128 are short
        "qwen3",
        Scheme(
            weight=replace(F8, granularity="block", group_size=128),
            act=replace(F8_TOKEN, granularity="group", group_size=32),
        ),
        "float-quantized",
    ),
    "fp8 group": (
        "llama",
        Scheme(weight=replace(F8, granularity="group", group_size=64), act=F8_TOKEN),
        "float-quantized",
    ),
    "w4a8 fp8": ("llama", Scheme(weight=G64, act=F8_TOKEN), "pack-quantized"),
    "fp8 kv8": ("llama", Scheme(weight=F8, act=F8_TOKEN, kv=KV8), "float-quantized"),
    "kv8 fp8": ("qwen3", Scheme(kv=replace(KV8, scale="unit")), "dense"),
    "kv8 static": ("llama", Scheme(weight=F8, kv=replace(KV8, scale="static")), "float-quantized"),
    "mxfp4 kv4": (
        "llama",
        Scheme(weight=mx("e2m1"), kv=KVCache(kind="mxfp4", bits=4)),
        "mxfp4-pack-quantized",
    ),
    "w4a16kv4": ("llama", Scheme(weight=G64, kv=KV4), "pack-quantized"),
    "kv4": ("llama", Scheme(kv=KV4), "dense"),
    "mixed": ("qwen2", Scheme(weight=NV, act=NV_ACT, overrides=MIXED), "mixed-precision"),
}
DTYPES = {
    "nvfp4-pack-quantized": {"U8"},
    "mxfp4-pack-quantized": {"U8"},
    "mxfp6-pack-quantized": {"U8"},
    "dense": {"BF16"},
    "mxfp8-quantized": {"F8_E4M3"},
    "pack-quantized": {"I32"},
    "int-quantized": {"I8"},
    "float-quantized": {"F8_E4M3"},
    "mixed-precision": {"U8", "I32", "I8", "BF16"},
}
ROTATED = ("nvfp4", "nvfp4 weights", "mxfp4", "w4a16", "w4a16 asymmetric", "w4a8", "w8a8", "mixed")
CASES = [(name, False) for name, (_, scheme, _) in SCHEMES.items() if CACHED or scheme.kv is None]
CASES += [(name, True) for name in ROTATED]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{case: (Made, what a fresh process found)}"""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {
        case: make(root / f"{i:02d}", *SCHEMES[case[0]][:2], case[1])
        for i, case in enumerate(CASES)
    }
    found = served_elsewhere(root, made.values())
    return {case: (each, found[str(each.folder)]) for case, each in made.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{' quarot' if case[1] else ''}")
def test_a_fresh_process_gets_what_was_evaluated(checkpoints, case):
    made, (differ, served, exact) = checkpoints[case]
    assert differ == [], "weights other than the evaluated ones in bfloat16"
    torch.testing.assert_close(
        exact, made.rounded, rtol=0, atol=1e-4
    )  # one activation code that differs shows at 1e-2
    assert perplexity(served) == pytest.approx(
        perplexity(made.exact), rel=0.03
    )  # of a random model, where codes flip often
    if made.snapshot.scheme.act is None and made.snapshot.scheme.kv is None:
        assert perplexity(served) == pytest.approx(
            perplexity(made.exact), rel=CompressedTensors.tolerance
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{' quarot' if case[1] else ''}")
def test_the_file_holds_codes_and_the_config_says_which(checkpoints, case):
    made, _ = checkpoints[case]
    config = json.loads((made.folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["format"] == SCHEMES[case[0]][2]
    assert config["architectures"] == [type(made.snapshot.adapter.model).__name__]
    with safe_open(made.folder / "model.safetensors", "pt") as file:
        names = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert config["tie_word_embeddings"] is (
        "lm_head.weight" not in names and "lm_head.weight_packed" not in names
    )
    quantized, group = set(made.snapshot.qtensors), quantization["config_groups"]
    assert ("lm_head" in quantization["ignore"]) is ("lm_head" not in quantized)
    for scheme in group.values():
        own = quantized if scheme["targets"] == ["Linear"] else set(scheme["targets"]) & quantized
        entries = BaseCompressor.get_value_from_registry(scheme["format"]).compression_param_names(
            QuantizationScheme(**scheme)
        )
        for name in own:
            held = {n.removeprefix(f"{name}.") for n in names if n.startswith(f"{name}.weight")}
            assert held == set(entries) - {"input_global_scale"}, name
    packed = {
        dtype
        for name, dtype in names.items()
        if name.endswith(("proj.weight_packed", "proj.weight"))
    }
    floats = {
        dtype
        for name, dtype in names.items()
        if name.endswith(("norm.weight", "bias", "embed_tokens.weight"))
    }
    assert floats == {"BF16"}
    assert packed == DTYPES[SCHEMES[case[0]][2]]


def test_a_placement_that_stays_online_is_not_written(checkpoints):
    made, _ = checkpoints["nvfp4", True]
    codec = QuaRot().draw(shape_of(made.snapshot.adapter.structure, Scheme()), 384, "R4")
    late = replace(
        made.snapshot,
        placements=[*made.snapshot.placements, Placement(online={(None, "down_in"): codec})],
    )
    with pytest.raises(ConfigError, match="online"):
        CompressedTensors().config(late)
    with pytest.raises(ConfigError, match="online"):
        next(CompressedTensors().tensors(late))


def test_load_gives_the_model_to_evaluate(checkpoints):
    made, (_, served, exact) = checkpoints["mixed", True]
    exporter = CompressedTensors()
    for dtype, wanted in ((torch.bfloat16, served), (torch.float32, exact)):
        model = exporter.load(made.folder, torch.device("cpu"), dtype)
        assert not model.config.use_cache
        assert torch.equal(logits(model), wanted)
        for name, q in made.snapshot.qtensors.items():
            assert torch.equal(exporter.weight(model, name), q.dequantize().bfloat16())


INTEGERS = [
    "w4a16",
    "w4a16 asymmetric",
    "w4a4",
    "w4a8 asymmetric",
    "w8a8",
    "w8a8 static",
    *["w4a16kv4"][:CACHED],
]
FP8S = [
    "fp8",
    "fp8 static",
    "fp8 block",
    "w4a8 fp8",
    *["fp8 kv8", "kv8 fp8", "kv8 static"][: 3 * CACHED],
]


@pytest.mark.parametrize("case", [*INTEGERS, *FP8S, "nvfp4", "mxfp4", "mixed"])
def test_a_bfloat16_run_is_served_bit_for_bit(tmp_path, case):
    family, scheme, _ = SCHEMES[case]
    made = make(tmp_path / "checkpoint", family, scheme, rotate=False, dtype=torch.bfloat16)
    served = CompressedTensors().load(made.folder, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(logits(served), made.exact)


@pytest.mark.parametrize("case", INTEGERS)
def test_a_float16_run_of_integers_is_served_in_float16_bit_for_bit(tmp_path, case):
    family, scheme, _ = SCHEMES[case]
    made = make(tmp_path / "checkpoint", family, scheme, rotate=False, dtype=torch.float16)
    served = CompressedTensors().load(made.folder, torch.device("cpu"), torch.float16)
    assert torch.equal(logits(served), made.exact)
    for name, q in made.snapshot.qtensors.items():
        assert torch.equal(served.get_submodule(name).weight, q.dequantize())
