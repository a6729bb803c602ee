"""The compressed-tensors checkpoint: plain transformers, in a process of its own, gets what was
evaluated; what the layout cannot hold is refused with both fields and a way out."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from composed import composed
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from preserved import tiny_shape
from references.integers import compressed_tensors_format
from safetensors import safe_open
from safetensors.torch import save_file

from harness.calibration.cache import calibrate
from harness.calibration.subject import StreamedModel
from harness.checkpoints import entries, layouts
from harness.checkpoints import source as checkpoint_source
from harness.checkpoints.base import Snapshot
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.folder import write_checkpoint
from harness.checkpoints.source import CheckpointModel
from harness.config.build import build, settings
from harness.config.errors import ConfigError, DataError
from harness.formats import (
    FP4,
    FP8,
    MX,
    NVFP4,
    Format,
    FourOverSix,
    Integer,
    KVCache,
    QTensor,
    Scales,
    Scheme,
)
from harness.libraries.compressed_tensors import cache_refusal
from harness.models.adapter import Adapter, shape_of
from harness.models.attention import attach
from harness.models.merge import fuse_norms, place, swap
from harness.models.tiny import Tiny
from harness.quantize import blocks
from harness.quantize.weights import solved
from harness.solvers import RTN
from harness.store import Run
from harness.transforms import Placement
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.identity import Identity
from harness.transforms.quarot import QuaRot

SERVED = {"compute_dtype": "input", "zp_range": "signed", "zp_order": "add_then_round"}
IDENTITY = Identity()
IDS = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))


def weight(bits=4, granularity="channel", **knobs) -> Integer:
    return Integer(bits=bits, granularity=granularity, incl0="always", scale_dtype="bf16", **knobs)


def token(bits=8, **knobs) -> Integer:
    """Asymmetric, a scale a token, in the dtype and the very order of compressed-tensors, so that
    no tie falls another way."""
    order = {"symmetric": False, "incl0": "always", **SERVED}
    return Integer(bits=bits, granularity="token", role="activation", **order | knobs)


def mx(element: str, role: str = "weight", **knobs) -> MX:
    bits = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8}[element]
    return MX(bits=bits, element=element, role=role, **{"mx_scale": "even"} | knobs)


NV, NV_ACT = NVFP4(), NVFP4(role="activation", scope="static", compute_dtype="input")
G64, KV4 = weight(granularity="group", group_size=64), KVCache(clip_k=1.0, clip_v=1.0, **SERVED)
MIXED = {(i, "mlp.down_proj"): {"weight": weight(8), "act": token()} for i in range(2)} | {
    (0, "self_attn.o_proj"): {"weight": None, "act": None},
    (1, "mlp.up_proj"): {"weight": weight(3)},
    (None, "lm_head"): {"weight": weight(8), "act": None},
}
STATIC = Integer(
    bits=8,
    granularity="tensor",
    role="activation",
    range="static",
    symmetric=False,
    scale_dtype="bf16",
    **SERVED,
)
F8 = FP8(scale_dtype="bf16")
F8_TOKEN = FP8(granularity="token", role="activation", compute_dtype="input")
F8_TENSOR = FP8(granularity="tensor", role="activation", compute_dtype="input", scale_dtype="bf16")
KV8 = KVCache(kind="fp8", bits=8, compute_dtype="input")
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
CACHED = cache_refusal() is None  # whether the installed releases quantize a cache at all
CASES = [(name, False) for name, (_, scheme, _) in SCHEMES.items() if CACHED or scheme.kv is None]
CASES += [(name, True) for name in ROTATED]
LOADER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

found, asked = {}, torch.load(sys.argv[1])
for folder, (ids, evaluated) in asked.items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        served = model(ids).logits
        weights = dict(model.named_parameters(remove_duplicate=False))
        differ = [
            n
            for n, w in evaluated.items()
            if weights[n].dtype != torch.bfloat16 or not torch.equal(weights[n], w)
        ]
        # the same quantizers without the rounding of bfloat16 around them
        torch.nn.Module.float(model)
        found[folder] = differ, served, model(ids).logits
assert "harness" not in sys.modules
torch.save(found, sys.argv[2])
"""


@dataclass
class Made:
    """A written checkpoint, its snapshot, and the evaluated logits: of float32 weights, and of the
    same rounded to bfloat16."""

    folder: object
    snapshot: Snapshot
    exact: torch.Tensor
    rounded: torch.Tensor


def rounded(model) -> None:
    """Every weight as bfloat16 holds it."""
    for module in model.modules():
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data.copy_(getattr(module, name).data.bfloat16())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def make(folder, family: str, scheme: Scheme, rotate: bool, dtype=torch.float32) -> Made:
    """Quantize the tiny model to nearest, with or without what merges of QuaRot, and write the
    checkpoint."""
    transform = QuaRot(r3="off", r4="off") if rotate else IDENTITY
    return written(folder, *Tiny(family=family).load(), scheme, transform, dtype)


def written(
    folder, model, tokenizer, scheme, transform=IDENTITY, dtype=torch.float32, engine=None
) -> Made:
    """The same of any model and transform."""
    for parameter in model.parameters():  # the rotary table stays float32
        parameter.data = parameter.data.to(dtype)
    adapter, placements = Adapter(model), []
    layers = adapter.structure.layers
    context = shape_of(adapter.structure, scheme)
    exporter = CompressedTensors(engine)
    exporter.check(scheme, [transform], context)
    swap(adapter)
    if transform is not IDENTITY:
        gains = fuse_norms(adapter)
        placements = [transform.fit(context, StreamedModel(adapter, IDS, gains=gains))]
        place(adapter, placements[0])
    rounded(model)
    run = Run(folder.with_name(folder.name + ".run"))
    run.path.mkdir(parents=True)
    if scheme.weight is not None:
        blocks.quantize(adapter, scheme, RTN(), IDS, run, lambda *_: None)
    if scheme.kv is not None and scheme.kv.needs_static:
        calibrate(adapter, scheme.kv, IDS)
    for heads in attach(adapter) if scheme.kv is not None else ():
        heads.format = scheme.kv
    qtensors = {
        name: q
        for i in range(layers + scheme.outside)
        for name, q in solved(adapter, scheme, run, i).items()
    }
    snapshot = Snapshot(adapter, tokenizer, scheme, placements, qtensors, {}, {})
    write_checkpoint(exporter, snapshot, folder)
    exact = logits(model)
    rounded(model)
    return Made(folder, snapshot, exact, logits(model))


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


def evaluated(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """{parameter as transformers has it: as evaluated, in bfloat16}"""
    state = snapshot.adapter.model.state_dict()
    floats = {n: t for n, t in state.items() if n.endswith((".weight", ".bias"))}
    quantized = {f"{name}.weight": q.dequantize() for name, q in snapshot.qtensors.items()}
    weights, experts = {}, {}
    for name, weight in (floats | quantized).items():
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf.isdigit():  # the linear of one expert
            experts.setdefault(path, []).append(weight)
        else:
            weights[name] = weight
    weights |= {name: torch.stack(each) for name, each in experts.items()}
    return {name: weight.bfloat16() for name, weight in weights.items()}


def served_elsewhere(root: Path, made) -> dict:
    """{folder: what a process without this project finds there} of those that were Made."""
    asked = {str(each.folder): (IDS, evaluated(each.snapshot)) for each in made}
    torch.save(asked, root / "asked.pt")
    (root / "loader.py").write_text(LOADER)
    elsewhere = [
        p
        for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if p and not Path(p, "harness").is_dir()
    ]
    outside = os.environ | {"PYTHONPATH": os.pathsep.join(elsewhere)}  # without this project
    outside |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "loader.py", "asked.pt", "found.pt"]
    done = subprocess.run(
        command, cwd=root, env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / "found.pt")


def perplexity(x: torch.Tensor) -> float:
    return (
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
        .exp()
        .item()
    )


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


@pytest.mark.parametrize(
    "reference", ["nvfp4", "mxfp4", "int4_sym_group32", "int4_asym_group64", "int4_sym_channel"]
)
def test_golden_entries(golden_dir, reference):
    with safe_open(golden_dir / "packed_checkpoints.safetensors", "pt") as file:
        keys = [key for key in file.keys() if f"/{reference}" in key]  # noqa: SIM118
        golden = {key: file.get_tensor(key) for key in keys}
        inputs = {
            case: file.get_tensor(f"{case}/x") for case in {key.split("/")[0] for key in keys}
        }
    cases = {key.rpartition("/")[0] for key in keys}
    assert cases
    for case in cases:
        kind = case.split("/")[1]
        if kind == "nvfp4":
            format, layout = NVFP4(compute_dtype="input"), "nvfp4-pack-quantized"
        elif kind == "mxfp4":
            format, layout = MX(mx_scale="even", compute_dtype="input"), "mxfp4-pack-quantized"
        else:
            parts = re.fullmatch(r"int(\d)_(sym|asym)_(group|channel)(\d*)", kind).groups()
            format, layout = compressed_tensors_format(*parts), "pack-quantized"
        q = format.quantize(inputs[case.split("/")[0]])
        for name, tensor in entries.weight_entries(q, layout).items():
            wanted = golden[f"{case}/{name}"]
            wanted = (
                wanted.bfloat16() if tensor.dtype == torch.bfloat16 else wanted.view(tensor.dtype)
            )
            assert torch.equal(tensor.float(), wanted.view(tensor.shape).float()), f"{case}/{name}"


@pytest.mark.parametrize("bits", range(2, 9))
def test_words(bits):
    low = 2 ** (bits - 1)
    codes = torch.randint(
        -low, low, (5, 77), generator=torch.Generator().manual_seed(bits), dtype=torch.int8
    )
    assert torch.equal(entries.pack_words(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(
        entries.pack_words(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0)
    )


def decoded(q: QTensor) -> torch.Tensor:
    """The weight that compressed-tensors makes of a QTensor's entries."""
    kind = layouts.layout(q.format, None, alone=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=layouts.described(q.format), format=kind
    )
    return BaseCompressor.get_value_from_registry(kind).decompress(
        entries.weight_entries(q, kind), scheme
    )["weight"]


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e4m3"])
def test_every_block_scale_and_every_element_is_held(element):
    format = mx(element)
    codes = torch.arange(2**format.bits, dtype=torch.uint8)[
        ~format.grid.decode(torch.arange(2**format.bits)).isnan()
    ]
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % 32)).expand(254, -1).contiguous()
    scale = (
        torch.arange(1, 255, dtype=torch.uint8)
        .view(-1, 1)
        .expand(-1, codes.shape[-1] // 32)
        .contiguous()
    )
    q = QTensor(codes, Scales(scale), format, torch.bfloat16)
    assert torch.equal(decoded(q), q.dequantize())


def test_fouroversix_decodes_to_its_values_or_is_refused():
    """Its own decoding rounds otherwise; what bfloat16 weights decode to often lies on a tie, which
    then falls either way."""
    held = {torch.float32: 0, torch.bfloat16: 0}
    for dtype in held:
        for seed in range(40):
            q = FourOverSix().quantize(
                torch.randn(32, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
            )
            try:
                assert torch.equal(decoded(q), q.dequantize().bfloat16()), seed
                held[dtype] += 1
            except DataError as error:
                assert "use export=harness" in str(error)
    assert held[torch.float32] == 40
    assert 20 < held[torch.bfloat16] < 40


REFUSED = {
    "format.act.mx_scale=floor": Scheme(
        weight=mx("e2m1"), act=mx("e2m1", "activation", mx_scale="floor")
    ),
    "format.act.mx_even_mbits=element": Scheme(weight=mx("e4m3"), act=mx("e4m3", "activation")),
    "format.weight.element=e3m2": Scheme(weight=mx("e3m2")),
    "format.weight.mx_scale=fpquant": Scheme(weight=mx("e2m1", mx_scale="fpquant")),
    "format.weight=FP4": Scheme(weight=FP4()),
    "format.weight.element=e5m2": Scheme(weight=replace(F8, element="e5m2")),
    "format.weight.scale_dtype=float32": Scheme(weight=FP8()),
    "format.act.scale_dtype=float32": Scheme(
        weight=F8, act=replace(F8_TENSOR, range="static", scale_dtype="float32")
    ),
    "format.act.compute_dtype=float32": Scheme(
        weight=F8, act=replace(F8_TOKEN, compute_dtype="float32")
    ),
    "format.act.group_size=128": Scheme(  # of 192 and 384 features
        weight=F8, act=replace(F8_TOKEN, granularity="group", group_size=128, pad="zero")
    ),
    "format.kv.bits=4 and format.kv.kind=nvfp4": Scheme(
        kv=KVCache(kind="nvfp4", compute_dtype="input")
    ),
    "format.kv.bits=8 and format.kv.kind=fp8_e5m2": Scheme(kv=replace(KV8, kind="fp8_e5m2")),
    "format.kv.bits=8 and format.kv.group_size=-1": Scheme(kv=replace(KV8, group_size=-1)),
    "format.act=FourOverSix": Scheme(weight=NV, act=FourOverSix(role="activation", scope="static")),
    "format.act.scope=token": Scheme(weight=NV, act=NVFP4(role="activation", scope="token")),
    "format.weight.scale_dtype=input": Scheme(weight=replace(G64, scale_dtype="input")),
    "format.weight.incl0=auto": Scheme(weight=replace(G64, symmetric=False, incl0="auto")),
    "format.act.clip=0.9": Scheme(weight=G64, act=token(clip=0.9)),
    "format.act.int_scale=qmax": Scheme(weight=G64, act=token(symmetric=True)),
    "format.overrides: mlp.up_proj.act.scope=tensor": Scheme(
        weight=NV, act=NV_ACT, overrides={(1, "mlp.up_proj"): {"act": NVFP4(role="activation")}}
    ),
    "format.overrides: mlp.up_proj.act.clip=0.9": Scheme(  # of one block, whatever others have
        weight=NV,
        act=NV_ACT,
        overrides={
            (0, "mlp.up_proj"): {"act": token(clip=0.9)},
            (1, "mlp.up_proj"): {"act": token()},
        },
    ),
    "format.overrides: model.embed_tokens": Scheme(
        weight=NV, overrides={(None, "model.embed_tokens"): {"weight": weight(8)}}
    ),
    "format.kv.bits=4 and format.kv.clip_k=0.95": Scheme(weight=G64, kv=replace(KV4, clip_k=0.95)),
    "format.kv.bits=8 and format.kv.symmetric=True": Scheme(
        weight=G64, kv=replace(KV4, bits=8, symmetric=True)
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_formats_that_the_layout_cannot_hold(field):
    context = tiny_shape(REFUSED[field])
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(field)}.* with export=compressed_tensors: .* use export=harness",
    ):
        CompressedTensors().check(REFUSED[field], [Identity()], context)


@pytest.mark.parametrize(
    ("transform", "left"),
    [
        (HadamardBlocks(), "a matrix at attn_in"),
        (QuaRot(), "R4"),
        (QuaRot(r4="off", online_heads=True), "a mix of heads"),
    ],
)
def test_what_stays_online_is_refused(transform, left):
    scheme = Scheme(weight=NV, act=NV_ACT)
    with pytest.raises(
        ConfigError,
        match=f"transform=.* with export=compressed_tensors: .*{left}.* use export=harness",
    ):
        CompressedTensors().check(scheme, [Identity(), transform], tiny_shape(scheme))


def test_what_is_served_otherwise_is_warned_of():
    scheme = Scheme(weight=FourOverSix(), act=NV_ACT, kv=KV4 if CACHED else None)
    context = tiny_shape(scheme)
    words = [*["kv"][:CACHED], "FourOverSix", "served in bfloat16 and evaluated in"]
    for dtype in ("float32", "float16", "auto", "bfloat16"):
        warned = CompressedTensors().check(scheme, [], context, dtype)
        expected = words[:-1] if dtype == "bfloat16" else words
        assert [next(word for word in words if word in each) for each in warned] == expected
    assert CompressedTensors().check(Scheme(weight=NV), [], context, "float32") == []
    assert CompressedTensors().check(Scheme(weight=G64, act=token()), [], context, "float16") == []


def test_a_cache_that_nothing_would_quantize_is_refused(tmp_path, monkeypatch):
    scheme = Scheme(kv=KV4)
    monkeypatch.setattr(
        layouts, "cache_refusal", lambda: "one does not find the cache of the other"
    )
    with pytest.raises(
        ConfigError, match=r"format\.kv\.bits=4 with export=compressed_tensors: one does not find"
    ):
        CompressedTensors().check(scheme, [], tiny_shape(scheme))
    monkeypatch.setattr(
        checkpoint_source, "cache_refusal", lambda: "one does not find the cache of the other"
    )
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 4}}
    (tmp_path / "config.json").write_text(
        json.dumps(Tiny().facts() | {"quantization_config": scheme})
    )
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"kv_cache_scheme: one does not find"):
        CheckpointModel(path=str(tmp_path)).check()
    assert CompressedTensors().check(Scheme(weight=NV), [], tiny_shape(Scheme(weight=NV))) == []


def activations(dtype: torch.dtype) -> torch.Tensor:
    """[2, 96, 64]: tokens of both signs, of one, all zero, tiny, with an outlier, and on the ties
    of 8-bit codes."""
    x = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(5))
    x[:, 8:16].abs_()
    x[:, 16:24].abs_().neg_()
    x[:, 24] = 0
    x[:, 25:32] *= 1e-4
    x[:, 32:40, 7] *= 500
    x[:, 40:48] = torch.arange(64) / 2 - 16
    x[:, 40:48, 63] = 255 - 16
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "chosen",
    [
        ["format=int8"],
        ["format=int4"],
        ["format=w4a4kv4"],
        ["format=int8", "format.act.granularity=tensor"],
        ["format=int8", "format.act.granularity=group", "format.act.group_size=32"],
        ["format=int8", "format.act.symmetric=true", "format.act.int_scale=half_range"],
        ["format=nvfp4"],
        ["format=fp8"],
        ["format=w4a8_fp8"],
        ["format=fp8", "format.act.granularity=tensor"],
        ["format=fp8_block", "format.act.group_size=32"],
        ["format=mxfp4", "format.act.mx_scale=even"],
        ["format=mxfp6", "format.act.mx_scale=even"],
        ["format=mxfp8", "format.act.mx_scale=even", "format.act.mx_even_mbits=1"],
    ],
    ids=str,
)
def test_activations_are_evaluated_as_they_are_served(chosen, dtype):
    """What compressed-tensors computes at run time from what config.json says, in every bit."""
    cfg, _ = composed("export=compressed_tensors", *chosen)
    act = build(settings(cfg)["format"]["act"], "format.act", Format)
    layouts.refuse(act, "format.act")
    if entries.served(dtype, [act]) != dtype and dtype != torch.float32:
        pytest.skip("no model of this format is served in float16")
    x, args = activations(dtype), QuantizationArgs(**layouts.described(act))
    g = act.calibrated(*torch.aminmax(x)) if act.needs_static else None
    served = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None, g), args, g)
    assert served.dtype == dtype
    assert torch.equal(act.fake(x, global_scale=g), served.view(x.shape))


@pytest.mark.skipif(not CACHED, reason="the installed releases quantize no cache")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "chosen",
    [
        ["format=w4a4kv4"],
        ["format=w4a4kv4", "format.kv.group_size=16"],
        ["format=fp8_kv"],
        ["format=fp8_kv", "format.kv.group_size=16"],
        ["format=fp8_kv", "format.kv.scale=unit"],
        ["format=mxfp4_kv"],
    ],
    ids=str,
)
def test_keys_and_values_are_evaluated_as_they_are_served(chosen, dtype):
    cfg, _ = composed(
        "export=compressed_tensors", "format.kv.clip_k=1.0", "format.kv.clip_v=1.0", *chosen
    )
    kv = build(settings(cfg)["format"]["kv"], "format.kv", KVCache)
    x, args = (
        activations(dtype).view(2, 96, 2, 32).transpose(1, 2),
        QuantizationArgs(**layouts.cache_scheme(kv, 32)),
    )
    if args.dynamic:
        scales = compute_dynamic_scales_and_zp(x, args, None)
    else:
        scales = entries.cache_entries(kv)["k_scale"].to(dtype), None
    assert torch.equal(kv.fake(x, "key"), fake_quantize(x, *scales, args))


def test_a_static_scale_is_that_of_the_evaluation():
    """Computed in the activations' dtype from the range seen, and stored; transformers reads it in
    the dtype it computes in."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = activations(dtype)
        seen = STATIC.calibrated(*torch.aminmax(x))
        stored = entries.input_entries(STATIC, seen, dtype)
        args = QuantizationArgs(**layouts.described(STATIC))
        served = fake_quantize(x, stored["input_scale"].to(dtype), stored["input_zero_point"], args)
        assert torch.equal(STATIC.fake(x, global_scale=seen), served)


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


def test_small_scales_of_a_float16_model_are_held_by_both_dtypes():
    """A row of small weights has a scale among the subnormals of float16."""
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    w = (noise * torch.exp2(-torch.arange(64.0) / 3).view(-1, 1)).half()
    for bits in (4, 8):
        scale = weight(bits).scales(w).scale
        assert scale.min() < 2**-17
        assert torch.equal(scale.half().bfloat16(), scale)


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
