"""AIMET's encodings: ranges and steps of integer weights, and of inputs on one calibrated range.

    x = scale (q + offset),  q = 0 .. N = 2^bits - 1,  min = scale offset,  max = scale (N + offset)

As AIMET itself does it, two files of one simulation, named by its own rules:

model_torch.encodings   what its torch loader reads (`QuantizationSimModel.load_encodings`), 0.6.1:
    {"param_encodings": {"<module>.weight": [E, .. one a channel]},
     "activation_encodings": {"<module>": {"input": {"0": E}}}}
    E = {"bitwidth", "dtype", "is_symmetric", "min", "max", "scale", "offset"}
model.encodings         for QNN, 1.0.0, lists of
    {"name", "dtype", "bw", "is_sym", "enc_type", "scale": [..], "offset": [..], "block_size"}

Channels are rows. Weights in groups are PER_BLOCK in the second file; the first knows channels. The
second has no activations: it would call them as an ONNX graph does, which is not exported here.
Left out of both: other formats, and zero points that are no code. Source: AIMET 2.42.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness.formats import Integer, QTensor, Scales
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.store import write_json

TORCH = "model_torch.encodings"
QNN = "model.encodings"
KINDS = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL", "group": "PER_BLOCK"}


def held(format: object) -> bool:
    """Whether a format's steps and offsets are an encoding."""
    return isinstance(format, Integer) and not format.shifted


def channels(format: Integer, scales: Scales) -> list[dict]:
    """An encoding a scale, by the torch loader's words."""
    scale, offset = _grid(format, scales)
    low = scale * offset
    high = scale * (offset + 2**format.bits - 1)
    columns = (each.flatten().tolist() for each in (scale, offset, low, high))
    return [
        {
            "bitwidth": format.bits,
            "dtype": "int",
            "is_symmetric": str(format.symmetric),
            "scale": step,
            "offset": int(start),
            "min": least,
            "max": most,
        }
        for step, start, least, most in zip(*columns)
    ]


def listed(name: str, format: Integer, scales: Scales) -> dict:
    """All scales of a tensor in one encoding, by QNN's words."""
    scale, offset = _grid(format, scales)
    entry: dict[str, object] = {
        "name": name,
        "dtype": "INT",
        "bw": format.bits,
        "is_sym": format.symmetric,
        "enc_type": KINDS[format.granularity],
        "scale": scale.flatten().tolist(),
        "offset": offset.to(torch.int32).flatten().tolist(),
    }
    return entry if format.group_size is None else entry | {"block_size": format.group_size}


def inputs(adapter: Adapter) -> dict[str, dict]:
    """{module: its `activation_encodings`} of all linears that read one calibrated range."""
    found = {}
    for name, module in adapter.model.named_modules():
        # behind a codec, what is quantized is no module's input
        if not isinstance(module, QuantLinear) or module.site.codec is not None:
            continue
        format = module.site.format
        if not isinstance(format, Integer) or not held(format) or not format.needs_static:
            continue
        seen = module.site.global_scale
        # the range alone makes the scale, in the dtype of what is read
        like = torch.zeros(1, 1, dtype=module.weight.dtype, device=adapter.device)
        (encoding,) = channels(format, format.scales(like, seen))
        found[name] = {"input": {"0": encoding}}
    return found


def save_encodings(
    folder: Path, blocks: Iterable[Mapping[str, QTensor]], activations: Mapping[str, dict]
) -> None:
    """Write both files of the weights {name: QTensor} of all blocks; none where there are none."""
    torch_file: dict[str, list[dict]] = {}
    qnn_file: list[dict] = []
    for qtensors in blocks:
        for name, q in qtensors.items():
            if not isinstance(q.format, Integer) or not held(q.format):
                continue
            entry = f"{name}.weight"
            if q.format.granularity != "group":
                torch_file[entry] = channels(q.format, q.scales)
            qnn_file.append(listed(entry, q.format, q.scales))
    if not qnn_file and not activations:
        return
    document: dict[str, object] = {"version": "0.6.1", "activation_encodings": activations}
    write_json(folder / TORCH, document | {"param_encodings": torch_file})
    document = {"version": "1.0.0", "activation_encodings": []}
    write_json(folder / QNN, document | {"param_encodings": qnn_file})


def _grid(format: Integer, scales: Scales) -> tuple[Tensor, Tensor]:
    """(scale, offset) of unsigned codes of all bits."""
    scale = scales.scale.float()
    lowest = -(2 ** (format.bits - 1)) if format.signed else 0
    zero = 0 if scales.zero is None else scales.zero
    return scale, lowest - zero + 0 * scale
