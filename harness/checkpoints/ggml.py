"""GGML's types that hold a weight in every bit, and how its codes and scales lie in them.

A row of n weights is n / 32 blocks, one after the other:

| type  | format                            | block                           | value    |
|-------|-----------------------------------|---------------------------------|----------|
| Q4_0  | INT4, symmetric                   | d float16, 16 bytes of q + 8    | d q      |
| Q4_1  | INT4, asymmetric, zp=half_offset  | d, m float16, 16 bytes of q     | d q + m  |
| Q8_0  | INT8, symmetric                   | d float16, 32 bytes of q        | d q      |
| MXFP4 | MXFP4                             | d E8M0, 16 bytes of codes       | d E2M1   |

Byte i of 16 has code i in its low half and code i + 16 in its high one. A scale that spans more
than 32 weights stands in each of its blocks. d q is exact in float32 and d q + m rounded once, as
our decoder has it. A rounded zero point z is no such m: s z has more bits than float16. NVFP4,
which GGML has too, leaves its global scale to a tensor that multiplies products, not weights.

Source: llama.cpp, ggml-quants.c and ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from harness.config.errors import ConfigError, DataError
from harness.formats import MX, NVFP4, Format, Integer, QTensor, weight_format
from harness.transforms import ModelShape

BLOCK = 32  # weights
WAY_OUT = "or use export=harness"
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def refuse(format: Format, field: str, context: ModelShape) -> None:
    """Raise ConfigError, with the setting to change, for a weight that no type holds in every bit.

    field: where the format is in the settings.
    """
    if type(format) not in (Integer, MX):
        kind = type(format).__name__
        why = "GGML has no such type"
        if isinstance(format, NVFP4):
            why = "GGML's blocks of it have no place for the global scale"
        raise ConfigError(
            f"{field}={kind} with export=gguf: {why}; take format=int4, int8 or mxfp4, {WAY_OUT}."
        )
    for key, legal, why in _knobs(format):
        if getattr(format, key) not in legal:
            raise ConfigError(
                f"{field}.{key}={getattr(format, key)} with export=gguf: {why}; set "
                f"{field}.{key}={str(legal[0]).lower()}, {WAY_OUT}."
            )
    spans = set(context.widths.values()) if format.group_size is None else {format.group_size}
    for span in spans:
        if span % BLOCK:
            raise ConfigError(
                f"{field}.group_size={format.group_size} with export=gguf: a scale spans {span} "
                f"weights, and a block has {BLOCK}; set {field}.group_size={BLOCK}, {WAY_OUT}."
            )


def _knobs(format: Format) -> Iterable[tuple[str, tuple, str]]:
    """(key, what it may be, why)."""
    yield "pad", ("error",), "groups divide the width"
    yield "compute_dtype", ("float32",), "values are decoded in float32"
    if isinstance(format, MX):
        yield "bits", (4,), "GGML has MXFP4 alone"
        yield "mx_scale", ("floor", "ceil", "even", "rceil"), "its scales are no powers of two"
        return
    yield "scale_dtype", ("fp16",), "scales are stored in float16"
    if format.symmetric:
        yield "bits", (4, 8), "GGML has symmetric integers of 4 and 8 bits"
        return
    yield "bits", (4,), "GGML has asymmetric integers of 4 bits alone"
    yield "zp", ("half_offset",), "a block has its least value, in float16"


def type_of(q: QTensor) -> Type:
    """The type that holds a weight of this format."""
    format = weight_format(q)
    if isinstance(format, MX):
        return Type.MXFP4
    if format.bits == 8:
        return Type.Q8_0
    return Type.Q4_0 if format.symmetric else Type.Q4_1


def blocks(q: QTensor) -> Tensor:
    """Bytes [out, in / 32 * bytes of a block] of a weight [out, in].

    Raises DataError where a scale or a least value is no float16 number, which none is rounded to.
    """
    kind = type_of(q)
    rows = len(q.codes)
    codes = q.codes.reshape(rows, -1, BLOCK)
    if kind is Type.Q4_0:
        codes = codes + 8
    if kind is not Type.Q8_0:
        low, high = codes.view(torch.uint8).chunk(2, -1)
        codes = low | high << 4
    scale = _spread(q, q.scales.scale)
    parts = [scale.unsqueeze(-1) if kind is Type.MXFP4 else _half(scale)]
    if kind is Type.Q4_1:
        assert q.scales.zero is not None, "an asymmetric weight has one with every scale"
        parts.append(_half(_spread(q, q.scales.zero)))
    return torch.cat([*parts, codes.view(torch.uint8)], -1).reshape(rows, -1)


def _spread(q: QTensor, scales: Tensor) -> Tensor:
    """What each group has, [out, in / 32] for each block."""
    rows, width = q.shape
    each = weight_format(q).per_row(scales, rows)
    return each.repeat_interleave(width // BLOCK // each.shape[1], 1)


def _half(values: Tensor) -> Tensor:
    """The bytes [.., 2] of float16 numbers."""
    half = values.half()
    if not torch.equal(half.float(), values.float()):
        raise DataError(
            "export=gguf: scales and least values of this run's weights are no float16 numbers, "
            "which it would have to round; use export=harness, or tune=none."
        )
    return half.unsqueeze(-1).view(torch.uint8)
