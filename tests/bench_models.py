"""What the parts of the bench share: the embedded model with its text, quantizing it, and printing
a figure."""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness.calibration.shipped import Pydoc
from harness.calibration.windows import tokenize
from harness.config.build import build, option
from harness.formats import Format, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.source import ModelSource
from harness.quantize.blocks import quantize
from harness.store import Run

CALIBRATION = (32, 512)
EVALUATION = (4, 2048)


def nvfp4() -> Scheme:
    return Scheme(
        **{
            k: build(v, k, Format)
            for k, v in option("format", "nvfp4").items()
            if k in ("weight", "act")
        }
    )


def load():
    model, tokenizer = build(option("model", "smollm2_135m"), "model", ModelSource).load()
    return model, {
        part: tokenize(tokenizer, Pydoc().text(part)) for part in ("calibration", "evaluation")
    }


def quantized(model, scheme: Scheme, solver, calibration) -> Adapter:
    adapter = Adapter(model)
    swap(adapter)
    with tempfile.TemporaryDirectory() as folder:
        quantize(adapter, scheme, solver, calibration, Run(Path(folder)), lambda *report: None)
    return adapter


def row(name: str, figure: float, unit: str = "", bound: str = "") -> None:
    print(f"{name:<58} {figure:>10.2f} {unit:<8} {bound}", flush=True)
