"""How one quantized weight lies in a compressed-tensors file.

A weight is [m, n], of b bits, here:

| layout               | weight                                  | weight_scale     | besides      |
|----------------------|-----------------------------------------|------------------|--------------|
| nvfp4-pack-quantized | weight_packed uint8 [m, n / 2]          | E4M3 [m, n / 16] | global_scale |
| mxfp4-pack-quantized | weight_packed uint8 [m, n / 2]          | E8M0 [m, n / 32] |              |
| mxfp6-pack-quantized | weight_packed uint8 [m, 3 n / 4]        | E8M0 [m, n / 32] |              |
| mxfp8-quantized      | weight float8_e4m3fn [m, n]             | E8M0 [m, n / 32] |              |
| pack-quantized       | weight_packed int32 [m, ceil(n b / 32)] | D [m, groups]    | shape        |
| int-quantized        | weight int8 [m, n]                      | D [m, groups]    |              |
| float-quantized      | weight float8_e4m3fn [m, n]             | D [m, groups]    |              |
| dense                | weight D [m, n]                         |                  |              |

D is the dtype in which the file is served, bfloat16 or float16. E4M3 is stored as float8_e4m3fn,
E8M0 as its code in uint8. Besides: weight_global_scale is g, float32 [1]; weight_shape is int64
[2]. One scale a tensor is [1], one a square of FP8 [ceil(m / 128), ceil(n / 128)]. Asymmetric
integers have a weight_zero_point, int8 [m, groups], in pack-quantized packed along the rows: int32
[ceil(m b / 32), groups]. dense: only inputs are quantized.

Codes stand in a stream of bits, the first lowest: code i of a row in bits i b .. i b + b - 1,
integers as q + 2^(b - 1). Static inputs add input_global_scale (NVFP4) or input_scale (FP8) and
input_zero_point (integers). An FP8 cache of plain casts or static scales has k_scale and
v_scale, [1]. Checked
against compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.config.errors import DataError
from harness.formats import (
    FP8,
    MX,
    NVFP4,
    Format,
    FourOverSix,
    Integer,
    KVCache,
    QTensor,
    pack_nibbles,
)


def served(dtype: torch.dtype | None, formats: Iterable[Format]) -> torch.dtype:
    """The dtype in which whoever loads the file computes.

    Given that of the evaluated model (None: not known yet) and all formats: float16 for a float16
    model of integers. transformers unpacks NVFP4 and MX weights to bfloat16 whatever config.json
    says, and float16 inputs fail on those.
    """
    half = dtype == torch.float16 and all(isinstance(format, Integer) for format in formats)
    return torch.float16 if half else torch.bfloat16


def weight_entries(q: QTensor, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """{entry: tensor} of a quantized weight [out, in] in layout `kind`.

    dtype: that of float scales.
    """
    format = q.format
    scale = q.scales.scale
    if isinstance(format, NVFP4):
        g = stored_global_scale(q) if isinstance(format, FourOverSix) else q.scales.global_scale
        assert g is not None, "NVFP4 stores one with every weight"
        return {
            "weight_packed": pack_nibbles(q.codes),
            "weight_scale": scale,
            "weight_global_scale": g,
        }
    if isinstance(format, MX):
        if kind == "mxfp8-quantized":
            return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        return {"weight_packed": pack_bits(q.codes, format.bits), "weight_scale": scale}
    if isinstance(format, FP8):
        scale = scale.reshape(1) if format.granularity == "tensor" else scale
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": scale.to(dtype)}
    assert isinstance(format, Integer), "layouts.refuse lets no other through"
    return _integer_entries(q, format, kind, dtype)


def _integer_entries(
    q: QTensor, format: Integer, kind: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`weight_entries` of integers, whose codes and zero points are signed in the file."""
    offset = _offset(format)
    codes = (q.codes.to(torch.int16) - offset).to(torch.int8)
    scale = q.scales.scale
    if format.granularity == "tensor":
        scale = scale.reshape(1)
    entries = {"weight": codes, "weight_scale": scale.to(dtype)}
    if kind == "pack-quantized":
        entries["weight_packed"] = pack_words(codes, format.bits)
        entries["weight_shape"] = torch.tensor(q.shape)
        del entries["weight"]
    if q.scales.zero is None:
        return entries
    zero = (q.scales.zero - offset).to(torch.int8)
    if format.granularity == "tensor":
        zero = zero.reshape(1)
    elif kind == "pack-quantized":  # along the rows
        zero = pack_words(zero.T, format.bits).T
    return entries | {"weight_zero_point": zero}


def _offset(format: Integer) -> int:
    """What unsigned codes lie above the signed ones of the file."""
    return 0 if format.signed else 2 ** (format.bits - 1)


def input_entries(
    format: Format | None, seen: Tensor | None, evaluated: torch.dtype
) -> dict[str, Tensor]:
    """{entry: tensor} of what is static of a linear's input. seen: SiteInput.global_scale;
    evaluated: dtype of the activations, in which a scale is computed."""
    if isinstance(format, NVFP4):
        g = format.global_from_amax(torch.zeros(1)) if seen is None else seen.reshape(1).clone()
        return {"input_global_scale": g}
    if not isinstance(format, Integer | FP8) or format.range == "dynamic":
        return {}
    # a static range is calibrated before anything is evaluated, that of a plain cast is none
    zeros = torch.zeros(1, 1, dtype=evaluated, device=None if seen is None else seen.device)
    scales = format.scales(zeros, seen)
    entries = {"input_scale": scales.scale.reshape(1)}
    if isinstance(format, Integer) and scales.zero is not None:
        zero = (scales.zero - _offset(format)).to(torch.int8)
        entries["input_zero_point"] = zero.reshape(1)
    return entries


def scales_stored(kv: KVCache) -> bool:
    """Whether scales of keys and values stand in the file, the one kind that engines know."""
    return kv.kind == "fp8" and kv.scale != "dynamic"


def cache_entries(
    kv: KVCache | None,
    seen: Mapping[str, Tensor] | None = None,
    evaluated: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """{entry: tensor} of an attention module whose keys and values have scales known beforehand.

    seen: HeadsInput.scales; evaluated: dtype of keys and values, in which a scale is computed.
    """
    if kv is None or not scales_stored(kv):
        return {}
    entries = {}
    for part in ("key", "value"):
        calibrated = None if seen is None else seen.get(part)
        zeros = torch.zeros(1, 1, dtype=evaluated)
        if calibrated is not None:
            zeros = zeros.to(calibrated.device)
        scales = kv.part(part).scales(zeros, calibrated)
        entries[f"{part[0]}_scale"] = scales.scale.reshape(1)
    return entries


def stored_global_scale(q: QTensor) -> Tensor:
    """g, float32 [1], with which bf16(q (s / g)) is the evaluated bf16(((q s) amax) / 1536) of
    every code q and block scale s there is: 1536 / amax, or a float32 number within a few steps of
    it. Raises DataError if none is.
    """
    format = q.format
    amax = q.scales.global_scale
    assert isinstance(format, FourOverSix) and amax is not None
    # every pair of a scale and a code that occurs, once: 256 scales by 16 codes
    rows = zip(q.scales.scale.view(torch.uint8).split(1024), q.codes.split(1024))
    pairs = (scale.int().repeat_interleave(16, -1) * 16 + codes for scale, codes in rows)
    counts = torch.zeros(4096, dtype=torch.int64, device=q.codes.device)
    for pair in pairs:
        counts += torch.bincount(pair.flatten(), minlength=4096)
    occurring = counts.nonzero().flatten()
    codes = (occurring % 16).to(torch.uint8).view(-1, 1).expand(-1, 16)
    scale = (occurring // 16).to(torch.uint8).view(torch.float8_e4m3fn).view(-1, 1)
    evaluated = QTensor(codes, replace(q.scales, scale=scale), format, torch.bfloat16).dequantize()
    elements = format.grid.decode(codes)
    start = format.encode_multiplier(amax).reshape(1)
    for step in sorted(range(-8, 9), key=abs):
        g = (start.view(torch.int32) + step).view(torch.float32)
        if torch.equal((elements * (scale.float() / g)).bfloat16(), evaluated):
            return g
    raise DataError(
        f"no global scale near {start.item()} gives back the FourOverSix values of this weight in "
        "bfloat16; use export=harness"
    )


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """codes [rows, n], the low `bits` of each used, as a stream of bits: uint8 [rows, ceil(n bits /
    8)].
    """
    if bits == 4:
        return pack_nibbles(codes)
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)
    stream = (codes.view(torch.uint8).unsqueeze(-1) >> places[:bits]) & 1
    stream = stream.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << places).sum(-1, dtype=torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, n] as q + 2^(bits - 1): int32 [rows, ceil(n bits / 32)]."""
    packed = pack_bits((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)
