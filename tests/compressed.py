"""Formats as compressed-tensors serves them, checkpoints in its layout, and what a process without
this project finds in those."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.calibration.cache import calibrate
from harness.calibration.subject import StreamedModel
from harness.checkpoints.base import Snapshot
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.folder import write_checkpoint
from harness.formats import FP8, MX, NVFP4, Integer, KVCache, Scheme
from harness.libraries.compressed_tensors import cache_refusal
from harness.models.adapter import Adapter, shape_of
from harness.models.attention import attach
from harness.models.merge import fuse_norms, place, swap
from harness.models.tiny import Tiny
from harness.quantize import blocks
from harness.quantize.weights import solved
from harness.solvers import RTN
from harness.store import Run
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
CACHED = cache_refusal() is None  # whether the installed releases quantize a cache at all
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
