"""FP-Quant's checkpoint: its own package takes what is written, and its kernels, interpreted,
compute what was evaluated; what the layout cannot hold is refused with both fields and a way
out."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from composed import small
from preserved import tiny_shape
from safetensors.torch import load_file

from harness.checkpoints.base import Snapshot
from harness.checkpoints.folder import write_checkpoint
from harness.checkpoints.fp_quant import FPQuant
from harness.checkpoints.fp_quant_reader import decoded
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, FourOverSix, Integer, KVCache, Scheme
from harness.linalg.hadamard import hadamard
from harness.models.adapter import Adapter, shape_of, structure_of
from harness.models.merge import place, swap
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.quantize import blocks
from harness.quantize.weights import solved
from harness.solvers import RTN
from harness.store import Run
from harness.transforms.gsr import SequencyBlocks
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.identity import Identity
from harness.transforms.pca import PCA
from harness.transforms.quarot import QuaRot

IDS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
X = torch.randn(64, 192, generator=torch.Generator().manual_seed(1)).bfloat16().float()
NV = NVFP4(global_scale="fixed", fixed_decode_scale=2.0**-10)
NV_ACT = NVFP4(role="activation", global_scale="fixed", fixed_decode_scale=2.0**-3)
MX4, MX_ACT = MX(mx_scale="fpquant"), MX(role="activation", mx_scale="fpquant")
MX_ZERO = replace(MX_ACT, fp4_ties="zero")
ALONE = {(1, "mlp.down_proj"): {"weight": None, "act": None}}
CASES = {  # family, formats, transform, pseudo
    "nvfp4": ("llama", Scheme(weight=NV, act=NV_ACT), HadamardBlocks(16, random_signs=True), False),
    "mxfp4": ("qwen2", Scheme(weight=MX(mx_scale="rceil"), act=MX_ACT), HadamardBlocks(64), False),
    "mxfp4 fpquant": ("llama", Scheme(weight=MX4, act=MX_ACT, overrides=ALONE), Identity(), False),
    "nvfp4 pseudo": (
        "qwen3",
        Scheme(weight=NVFP4(), act=replace(NV_ACT, fp4_ties="zero")),
        HadamardBlocks(16),
        True,
    ),
    "mxfp4 pseudo": ("llama", Scheme(weight=MX4, act=MX_ZERO), SequencyBlocks(64), True),
    "mxfp4 pseudo alone": (
        "llama",
        Scheme(weight=MX(), act=MX_ZERO, overrides=ALONE),
        Identity(),
        True,
    ),
}
# On a CPU: the environment is not asked for, qutlass is never called, and nothing is timed to
# choose a block size.
LOADER = """
import sys
import torch
from fp_quant.module import linear
from fp_quant.module.triton.mxfp4 import mxfp4_forward_kernel
from fp_quant.module.triton.nvfp4 import nvfp4_forward_kernel, nvfp4_forward_kernel_wrapper
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizer_fp_quant import FPQuantHfQuantizer

FPQuantHfQuantizer.validate_environment = lambda *_, **__: None
linear.HAS_QUTLASS = True
for kernel in (mxfp4_forward_kernel, nvfp4_forward_kernel):
    kernel.configs = kernel.configs[:1]
asked, found = torch.load(sys.argv[1]), {}
for folder, pseudo in asked["folders"].items():
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=pseudo
    )
    taken = {n: t for n, t in model.state_dict().items() if t.numel()}
    served = torch.nn.Module.float(model)(asked["ids"]).logits.detach() if pseudo else None
    odd = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    found[folder] = taken, odd, served
matrices = {
    kind: getattr(linear, f"get_{kind}_matrix")(64, torch.bfloat16, "cpu")
    for kind in ("hadamard", "identity", "gsr")
}
block = matrices["hadamard"].float()
rounded = nvfp4_forward_kernel_wrapper(asked["x"], block, torch.tensor([8.0]))
torch.save((found, matrices, rounded), sys.argv[2])
"""


@dataclass
class Made:
    """A written checkpoint, its snapshot, and the logits of the evaluated model with every weight
    as bfloat16 holds it."""

    exporter: FPQuant
    folder: object
    snapshot: Snapshot
    logits: torch.Tensor


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def make(folder, family: str, scheme: Scheme, transform, pseudo: bool) -> Made:
    """Quantize the tiny model to nearest and write the checkpoint."""
    model, tokenizer = Tiny(family=family).load()
    adapter, exporter, context = (
        Adapter(model),
        FPQuant(pseudo),
        shape_of(structure_of(model.config), scheme),
    )
    exporter.check(scheme, [transform], context)
    swap(adapter)
    placements = [transform.fit(context, None)]
    place(adapter, placements[0])
    run = Run(folder.with_name(folder.name + ".run"))
    run.path.mkdir(parents=True)
    blocks.quantize(adapter, scheme, RTN(), IDS, run, lambda *_: None)
    qtensors = {name: q for i in range(2) for name, q in solved(adapter, scheme, run, i).items()}
    snapshot = Snapshot(adapter, tokenizer, scheme, placements, qtensors, {}, {})
    write_checkpoint(exporter, snapshot, folder)
    for module in model.modules():
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data.copy_(getattr(module, name).data.bfloat16())
    return Made(exporter, folder, snapshot, logits(model))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {case: make(root / f"{i}", *CASES[case]) for i, case in enumerate(CASES)}


@pytest.fixture(scope="module")
def reference(checkpoints, tmp_path_factory):
    """(what transformers and fp_quant made of every folder, its matrices, its NVFP4 of x), from a
    process of its own."""
    for package in ("triton", "fp_quant"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}, whose code reads the files")
    root = tmp_path_factory.mktemp("reference")
    torch.save(
        {
            "folders": {str(made.folder): made.exporter.pseudo for made in checkpoints.values()},
            "ids": IDS,
            "x": X,
        },
        root / "asked.pt",
    )
    (root / "loader.py").write_text(LOADER)
    outside = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "loader.py", "asked.pt", "found.pt"],
        cwd=root,
        env=outside,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_evaluated(checkpoints, case):
    made = checkpoints[case]
    model = made.exporter.load(made.folder, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(
        logits(model), made.logits, rtol=0, atol=1e-4
    )  # one activation code that differs shows at 1e-2
    tensors = load_file(made.folder / "model.safetensors")
    for name, q in made.snapshot.qtensors.items():
        assert torch.equal(made.exporter.weight(model, name), q.dequantize().bfloat16())
        if not made.exporter.pseudo:
            own = [
                tensors[f"{name}.{entry}"] for entry in ("qweight", "scales", "weight_global_scale")
            ]
            assert torch.equal(decoded(*own), q.dequantize())


def test_the_config_is_one_that_transformers_takes(checkpoints):
    from transformers.utils.quantization_config import FPQuantConfig

    for case, made in checkpoints.items():
        about = json.loads((made.folder / "config.json").read_text())["quantization_config"]
        assert about.items() <= FPQuantConfig(**about).to_dict().items()
        assert about["forward_dtype"] == case[:5]
        alone = (
            ["model.layers.1.mlp.down_proj", "lm_head"] if CASES[case][1].overrides else ["lm_head"]
        )
        assert about["modules_to_not_convert"] == alone


@pytest.mark.parametrize("case", CASES)
def test_fp_quant_takes_every_entry_as_it_is(checkpoints, reference, case):
    """No entry is missing, none is cast or reshaped; emulated MXFP4 gives the evaluated logits.
    transformers takes the scales that a pseudo file lacks to be of a wrong size. The interpreter
    rounds E4M3 scales up to a power of two wrongly, so NVFP4 is compared below, without such
    blocks."""
    made, (found, matrices, _) = checkpoints[case], reference
    taken, wrong, served = found[str(made.folder)]
    about = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert set(wrong) == ({"mismatched_keys"} if made.exporter.pseudo else set())
    assert all(".scales'" in key for keys in wrong.values() for key in keys)
    for name, tensor in load_file(made.folder / "model.safetensors").items():
        assert taken[name].dtype == tensor.dtype, name
        assert torch.equal(taken[name], tensor), name
    matrix = taken["model.layers.0.mlp.up_proj.forward_hadamard_matrix"]
    assert len(matrix) == about["hadamard_group_size"]
    if len(matrix) == 64:
        assert torch.equal(matrix, matrices[about["transform_init"]])
    if case.startswith("mxfp4 pseudo"):
        torch.testing.assert_close(served, made.logits, rtol=0, atol=1e-4)


def test_inputs_are_quantized_as_its_kernel_does(reference):
    mixed = (X.view(-1, 64) @ hadamard(64).float()).view_as(X)
    format = replace(NV_ACT, fp4_ties="zero")
    step = 8 * mixed.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True) / 6
    sure = (step.frexp()[0] < 0.96).expand(-1, -1, 16).flatten(-2)
    assert sure.float().mean() > 0.9
    assert torch.equal(reference[2][sure], format.fake(mixed)[sure])


OFF = Integer(bits=8, granularity="token", role="activation")
REFUSED = {  # field: formats, transform, pseudo
    "format.act.bits=16": (Scheme(weight=NV), Identity(), False),
    "format.weight=FourOverSix": (Scheme(weight=FourOverSix(), act=NV_ACT), Identity(), False),
    "format.act=MX": (Scheme(weight=NV, act=MX_ACT), Identity(), False),
    "format.act=Integer": (Scheme(weight=NV, act=OFF), Identity(), False),
    "format.kv.bits=4": (Scheme(weight=NV, act=NV_ACT, kv=KVCache()), Identity(), False),
    "format.weight.global_scale=amax": (Scheme(weight=NVFP4(), act=NV_ACT), Identity(), False),
    "format.weight.fixed_decode_scale=0.3": (
        Scheme(weight=replace(NV, fixed_decode_scale=0.3), act=NV_ACT),
        Identity(),
        False,
    ),
    "format.act.global_scale=amax": (
        Scheme(weight=NV, act=NVFP4(role="activation", scope="static")),
        Identity(),
        False,
    ),
    "format.act.fp4_ties=even": (Scheme(weight=NV, act=NV_ACT), Identity(), True),
    "format.act.mx_scale=even": (
        Scheme(weight=MX4, act=replace(MX_ACT, mx_scale="even")),
        Identity(),
        False,
    ),
    "format.overrides=mlp.up_proj": (
        Scheme(weight=NV, act=NV_ACT, overrides={(0, "mlp.up_proj"): {"weight": NVFP4()}}),
        Identity(),
        False,
    ),
    "format.overrides=mlp.down_proj": (
        Scheme(weight=NV, act=NV_ACT, overrides=ALONE),
        HadamardBlocks(16),
        False,
    ),
    "format.overrides=lm_head": (
        Scheme(weight=NV, act=NV_ACT, overrides={(None, "lm_head"): {"weight": NV, "act": NV_ACT}}),
        Identity(),
        False,
    ),
    "transform=pca": (Scheme(weight=NV, act=NV_ACT), PCA(), False),
    "transform=quarot": (Scheme(weight=NV, act=NV_ACT), QuaRot(), False),
    "transform.block_size=full": (Scheme(weight=NV, act=NV_ACT), HadamardBlocks("full"), False),
    "transform.block_size=16": (Scheme(weight=MX4, act=MX_ACT), HadamardBlocks(16), False),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_layout_cannot_hold_is_refused(field):
    scheme, transform, pseudo = REFUSED[field]
    transform.name = (
        field.removeprefix("transform=") if field.startswith("transform=") else transform.name
    )
    with pytest.raises(
        ConfigError, match=f"^{re.escape(field)}.* with export=fp_quant: .* use export=harness"
    ):
        FPQuant(pseudo).check(scheme, [transform], tiny_shape(scheme))


def test_a_bias_that_would_be_added_twice_is_refused_before_a_weight_is_loaded():
    scheme, transform, pseudo = CASES["mxfp4 pseudo"][1:]
    shape = shape_of(structure_of(Tiny(family="qwen2").load()[0].config), scheme)
    with pytest.raises(
        ConfigError, match=r"export.pseudo=true .*q_proj has a bias.* use export=harness"
    ):
        FPQuant(pseudo).check(scheme, [transform], shape)


def test_a_rounded_matrix_is_warned_of():
    scheme = Scheme(weight=MX4, act=MX_ACT)
    told = {n: FPQuant().check(scheme, [HadamardBlocks(n)], tiny_shape(scheme)) for n in (32, 64)}
    assert len(told[64]) == 1
    assert "block_size=32" in told[32][1]


@pytest.mark.parametrize("pseudo", [False, True])
def test_a_run_leaves_a_checkpoint_that_is_what_it_evaluated(tmp_path, pseudo):
    ties = "zero" if pseudo else "even"
    cfg, choices = small(
        tmp_path,
        "format=mxfp4",
        "format.act.mx_scale=fpquant",
        f"format.act.fp4_ties={ties}",
        "transform=hadamard",
        "solver=rtn",
        "export=fp_quant",
        f"export.pseudo={str(pseudo).lower()}",
        f"export.path={tmp_path / 'out'}",
    )
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["export"]["weights"] == 14
    tensors = load_file(f"{outcome.metrics['export']['path']}/model.safetensors")
    assert ("model.layers.0.mlp.up_proj.dqweight" in tensors) is pseudo
