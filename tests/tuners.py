"""What tests of tuners share: one solved linear and what learns on it, and quick runs."""

import torch
from composed import ROOT, small

from harness.config.build import option
from harness.pipeline.job import execute
from harness.tune.cells import within
from harness.tune.scales import Scaled

TUNERS = sorted({path.stem for path in (ROOT / "conf" / "tune").glob("*.yaml")} - {"none"})
LEARNERS = [
    ["tune=scales"],
    ["tune=scales", "tune.norms=false", "tune.lr=0.01"],
    ["tune=scales", "tune.codes=rounded", "tune.lr=0.01"],
    ["tune=scales", "tune.codes=dual", "tune.lr=0.01"],
    ["tune=weights"],
    ["tune=weights", "tune.norms=false", "tune.lr=0.001"],
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solved(format, dtype=torch.float32, moved=0.0):
    """(w, what a solver made of it that saw it moved by so many standard deviations)."""
    weight = draw(6, 64, dtype=dtype) / 10
    return weight, format.quantize(weight + moved * draw(6, 64, seed=1, dtype=dtype) / 10)


def scaled(q, weight, codes):
    return Scaled(q, None if codes == "fixed" else within(weight, q), codes == "dual")


def shift(module, size=0.2, seed=2):
    """Move what is learned away from its start."""
    for index, parameter in enumerate(module.parameters()):
        noise = draw(*parameter.shape, seed=seed + index, dtype=parameter.dtype)
        parameter.data += size * noise
    return module


def run(tmp_path, *overrides):
    quick = {
        name: ["tune.steps=4", "tune.windows=null"]
        for name in TUNERS
        if "steps" in option("tune", name)
    }
    chosen = next((o.partition("=")[2] for o in overrides if o.startswith("tune=")), None)
    return execute(*small(tmp_path, "solver=rtn", *quick.get(chosen, []), *overrides))
