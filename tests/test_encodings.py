"""Encodings as AIMET has them: every weight and input follows from its file, and AIMET's own loader
(`make aimet`), which then computes the logits that were evaluated."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from composed import ROOT, small
from omegaconf import OmegaConf

import harness
from harness.checkpoints.encodings import QNN, TORCH, channels, listed
from harness.formats import Int16, Integer
from harness.models.tiny import Tiny
from harness.pipeline.job import execute

AIMET = ROOT / ".venv-aimet" / "bin" / "python"
FIELDS = {
    "bitwidth": int,
    "dtype": str,
    "is_symmetric": str,
    "min": float,
    "max": float,
    "scale": float,
    "offset": int,
}
FORMATS = [
    Integer(bits=4),
    Integer(bits=4, int_range="narrow"),
    Integer(bits=4, symmetric=False),
    Integer(bits=8, granularity="tensor"),
    Integer(bits=4, symmetric=False, zp_range="signed"),
    Integer(bits=3, granularity="group", group_size=16),
    Int16(granularity="tensor"),
    Int16(symmetric=False),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_they_give_back_the_weight(format):
    """x = scale (q + offset) for codes from 0 on, and min and max are the ends of all bits."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    quantized = format.quantize(weight)
    found = channels(format, quantized.scales)
    scale, offset, low, high = (
        torch.tensor([entry[key] for entry in found], dtype=torch.float64).view(-1, 1)
        for key in ("scale", "offset", "min", "max")
    )
    groups = quantized.dequantize().double().view(len(found), -1)
    codes = groups / scale - offset
    last = 2**format.bits - 1
    lowest = -(2 ** (format.bits - 1)) if format.signed else 0
    wanted = quantized.codes.double().view(len(found), -1) - lowest
    assert (codes - wanted).abs().max() < 0.02  # float32 has eight bits more than an INT16 code
    assert wanted.min() >= 0 and wanted.max() <= last
    assert torch.allclose(low, scale * offset) and torch.allclose(high, scale * (last + offset))
    assert {entry["is_symmetric"] for entry in found} == {str(format.symmetric)}
    assert all({k: type(v) for k, v in entry.items()} == FIELDS for entry in found)
    whole = listed("w", format, quantized.scales)
    assert whole["scale"] == [entry["scale"] for entry in found]
    assert whole["offset"] == [entry["offset"] for entry in found]
    kinds = {"channel": "PER_CHANNEL", "tensor": "PER_TENSOR", "group": "PER_BLOCK"}
    assert whole["enc_type"] == kinds[format.granularity]
    assert whole.get("block_size") == format.group_size


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """(the run's folder, its checkpoint) of the AdaScale driver's simulation, min-max."""
    place = tmp_path_factory.mktemp("qsim")
    option = OmegaConf.load(ROOT / "conf" / "experiment" / "adascale_qsim.yaml")
    words = ["solver=minmax", "export=harness", f"export.path={place / 'out'}", "model.tie=false"]
    cfg, choices = small(place, "format=int4", *words)
    cfg.format = OmegaConf.merge(cfg.format, option.format)
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    return outcome.run.path, Path(outcome.metrics["export"]["path"])


def test_the_experiment_is_the_drivers(simulated):
    """W4A16 on a range an input, INT16 embedding, INT8 head; all inputs in one calibrated range."""
    run, folder = simulated
    told = json.loads((run / "min_max_encodings" / TORCH).read_text())
    model, _ = harness.load(folder)
    weights, inputs = told["param_encodings"], told["activation_encodings"]
    shapes = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if name.endswith(("_proj", "lm_head", "embed_tokens"))
    }
    assert {name: len(each) for name, each in weights.items()} == {
        name: 1 if "embed" in name else rows for name, (rows, _) in shapes.items()
    }
    bits = {name: {entry["bitwidth"] for entry in each} for name, each in weights.items()}
    wide = {"model.embed_tokens.weight": {16}, "lm_head.weight": {8}}
    assert bits == {name: wide.get(name, {4}) for name in shapes}
    assert inputs.keys() == {name.removesuffix(".weight") for name in shapes if "embed" not in name}
    for name, each in inputs.items():
        (entry,) = each["input"].values()
        seen = model.get_submodule(name).site.global_scale
        low, high = seen[0].clamp(max=0), seen[1].clamp(min=0)
        assert (entry["bitwidth"], entry["is_symmetric"]) == (16, "False")
        assert entry["scale"] == pytest.approx(float(high - low) / 65535, rel=1e-5)
        assert entry["min"] == pytest.approx(float(low), abs=entry["scale"])
    qnn = json.loads((run / "min_max_encodings" / QNN).read_text())
    assert [entry["name"] for entry in qnn["param_encodings"]] == list(weights)
    assert qnn["version"] == "1.0.0" and qnn["activation_encodings"] == []


LOADER = """
import sys, types
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()

class Anything:  # of torchvision, which no part of this needs
    def __getattr__(self, name):
        return Anything()

    def __call__(self, *args, **kwargs):
        return Anything()

vision = types.ModuleType("torchvision")
vision.ops = vision.transforms = vision.datasets = Anything()
sys.modules["torchvision"] = vision

from aimet_torch.nn import QuantizedLinear
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantsim import QuantizationSimModel

class Logits(torch.nn.Module):  # AIMET follows tensors and tuples of them
    def __init__(self):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, ids):
        return self.lm_head(self.model(ids, use_cache=False, return_dict=False)[0])

ids = torch.arange(64)[None]
sim = QuantizationSimModel(Logits().eval(), dummy_input=ids)
for module in sim.model.modules():
    if isinstance(module, QuantizedLinear):  # of some, AIMET has the quantizer at what comes before
        module.input_quantizers[0] = QuantizeDequantize((), 0, 2**16 - 1, symmetric=False)
sim.load_encodings(sys.argv[2], strict=True, partial=False, allow_overwrite=False)
with torch.no_grad():
    torch.save(sim.model(ids), sys.argv[3])
"""


@torch.no_grad()
@pytest.mark.aimet
@pytest.mark.skipif(not AIMET.exists(), reason="no .venv-aimet; make aimet")
def test_aimet_loads_the_file_and_computes_what_was_evaluated(simulated, tmp_path):
    """From the untouched weights, with no quantizer but those of the file."""
    run, folder = simulated
    untouched, _ = Tiny(tie=False).load()
    untouched.save_pretrained(tmp_path / "model")
    encodings = run / "min_max_encodings" / TORCH
    command = [str(AIMET), "-c", LOADER, str(tmp_path / "model"), str(encodings)]
    command += [str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    ids = torch.arange(64)[None]
    evaluated = harness.load(folder)[0](ids).logits
    plain = untouched(ids).logits
    off = (found - evaluated).norm() / (evaluated - plain).norm()
    assert off < 0.01, "of what quantizing did"
