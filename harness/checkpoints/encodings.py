"""Encodings: every quantized weight's ranges and steps as plain JSON, one file a block.

    [{"name", "bits", "symmetric", "axis", "group_size",
      "scale": [...], "offset": [...], "min": [...], "max": [...]}, ..]

x = scale (q + offset), q from 0 to 2^bits - 1 (one less for int_range=narrow), so min = scale
offset and max the same with the greatest q. Values are listed channel after channel (axis 0; group
after group inside a channel; axis null: one for the tensor). Integer formats only; a static
activation range is not among them. Source: the fields of AIMET's encodings files.
"""

from __future__ import annotations

from pathlib import Path

from harness.formats import Integer, QTensor
from harness.store import write_json


def encoding(name: str, tensor: QTensor) -> dict:
    """The encoding of one integer QTensor."""
    format = tensor.format
    assert isinstance(format, Integer)
    scale = tensor.scales.scale.float()
    stored = tensor.scales.zero
    zero = -float(format.qmin) if stored is None else stored - format.qmin
    offset = -zero + 0 * scale
    if format.shifted:
        assert stored is not None, "such a zero point is stored with every group"
        offset = stored / scale
    low = scale * offset
    high = scale * (format.qmax - format.qmin + offset)
    values = {"scale": scale, "offset": offset, "min": low, "max": high}
    return {
        "name": name,
        "bits": format.bits,
        "symmetric": format.symmetric,
        "axis": None if format.granularity == "tensor" else 0,
        "group_size": format.group_size,
        **{key: value.flatten().tolist() for key, value in values.items()},
    }


def save_encodings(folder: Path, index: int, qtensors: dict[str, QTensor]) -> None:
    """Write the encodings of one block's integer weights {name: QTensor} to folder/NNNN.json.

    Nothing where there are none.
    """
    encodings = [encoding(name, q) for name, q in qtensors.items() if isinstance(q.format, Integer)]
    if encodings:
        write_json(folder / f"{index:04d}.json", encodings)
