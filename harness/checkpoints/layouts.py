"""How one quantized weight lies in a compressed-tensors file.

And what the file says of it and of its input. A weight is [m, n], of b bits, here:

| layout               | weight                                  | weight_scale     | besides      |
|----------------------|-----------------------------------------|------------------|--------------|
| nvfp4-pack-quantized | weight_packed uint8 [m, n / 2]          | E4M3 [m, n / 16] | global_scale |
| mxfp4-pack-quantized | weight_packed uint8 [m, n / 2]          | E8M0 [m, n / 32] |              |
| mxfp6-pack-quantized | weight_packed uint8 [m, 3 n / 4]        | E8M0 [m, n / 32] |              |
| mxfp8-quantized      | weight float8_e4m3fn [m, n]             | E8M0 [m, n / 32] |              |
| pack-quantized       | weight_packed int32 [m, ceil(n b / 32)] | D [m, groups]    | shape        |
| int-quantized        | weight int8 [m, n]                      | D [m, groups]    |              |
| dense                | weight D [m, n]                         |                  |              |

D is the dtype in which the file is served, bfloat16 or float16. E4M3 is stored as float8_e4m3fn,
E8M0 as its code in uint8. Besides: weight_global_scale is g, float32 [1]; weight_shape is int64
[2]. Asymmetric integers have a weight_zero_point, int8 [m, groups], in pack-quantized packed along
the rows: int32 [ceil(m b / 32), groups]. dense: only inputs are quantized.

Codes stand in a stream of bits, the first lowest: code i of a row in bits i b .. i b + b - 1,
integers as q + 2^(b - 1). Static inputs add input_global_scale (NVFP4) or input_scale and
input_zero_point (integers). Checked against compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from harness.config.errors import ConfigError, DataError
from harness.formats import (
    MX,
    NVFP4,
    Format,
    FourOverSix,
    Integer,
    KVCache,
    QTensor,
    pack_nibbles,
)
from harness.libraries.compressed_tensors import cache_refusal

WAY_OUT = "or use export=harness"
HELD = {"weight": (NVFP4, FourOverSix, MX, Integer), "activation": (NVFP4, MX, Integer)}
ELEMENTS = {4: ("e2m1",), 6: ("e2m3",), 8: ("e4m3",)}  # of MX, by bits


# what the layout holds


def refuse(format: Format, field: str) -> None:
    """Raise ConfigError, with the setting to change, where a weight's or an activation's format
    cannot stand in a file exactly as it is evaluated. field: where the format is in the settings.
    """
    weight = format.role == "weight"
    if type(format) not in HELD[format.role]:
        kind = type(format).__name__
        kinds = ", ".join(each.__name__ for each in HELD[format.role])
        raise ConfigError(
            f"{field}={kind} with export=compressed_tensors: the layout knows no such "
            f"{format.role}; take one of {kinds}, {WAY_OUT}."
        )
    for key, legal, why in (_weight if weight else _input)(format):
        if getattr(format, key) not in legal:
            raise ConfigError(
                f"{field}.{key}={getattr(format, key)} with export=compressed_tensors: {why}; set "
                f"{field}.{key}={legal[0]}, {WAY_OUT}."
            )


def _weight(format: Format) -> Iterable[tuple[str, tuple, str]]:
    """(key, what it may be, why) of a weight, whose codes and scales stand in the file: only their
    kinds matter.
    """
    yield "pad", ("error",), "groups divide the width"
    if isinstance(format, MX):
        yield "element", ELEMENTS[format.bits], "the layout has no such element"
        yield "mx_scale", ("even", "floor", "ceil", "rceil"), "its scales are no powers of two"
    if isinstance(format, Integer):
        yield (
            "scale_dtype",
            ("bf16",),
            "scales are loaded in the checkpoint's dtype, so codes must come from such",
        )
        yield "zp", ("rounded",), "zero points are whole numbers"
        if not format.spans_zero:
            yield "incl0", ("always",), "zero points are codes, so zero lies in every range"


def _input(format: Format) -> Iterable[tuple[str, tuple, str]]:
    """(key, what it may be, why) of an activation, which others compute from these few words."""
    yield "observer", ("minmax",), "ranges at run time are the extremes"
    yield "pad", ("error",), "groups divide the width"
    if isinstance(format, Integer):
        static = format.range == "static"
        yield "zp", ("rounded",), "zero points are whole numbers"
        if static:
            yield "scale_dtype", ("bf16",), "a stored scale is loaded in the checkpoint's dtype"
        else:
            yield "scale_dtype", ("float32", "input"), "scales at run time are as computed"
            yield "clip", (1.0,), "ranges at run time are the extremes"
        yield "int_range", ("full",), "codes reach -2^(bits - 1)"
        if format.symmetric and not static:
            yield (
                "int_scale",
                ("half_range",),
                "a symmetric scale at run time is the greatest magnitude over (2^bits - 1) / 2",
            )
        if not format.symmetric:
            yield (
                "zp_order",
                ("add_then_round",),
                "at run time the zero point is added before rounding",
            )
            yield "zp_range", ("signed",), "zero points at run time are signed codes"
    else:
        yield "fp4_ties", ("even",), "a tie at run time goes to the even code"
    if isinstance(format, NVFP4) and format.global_scale not in ("fixed", "none"):
        yield "scope", ("static",), "the global scale of an activation is stored"
    if isinstance(format, MX):
        yield "element", ELEMENTS[format.bits], "the layout has no such element"
        yield "mx_scale", ("even",), "scales at run time are rounded that way"
        if format.element == "e4m3":
            yield (
                "mx_even_mbits",
                (1,),
                "scales at run time are rounded as those of one mantissa bit",
            )
        elif format.element == "e2m3":
            yield (
                "mx_even_mbits",
                ("element",),
                "scales at run time are rounded as those of three mantissa bits",
            )
    else:  # an MX scale and its elements are exact in any dtype
        yield "compute_dtype", ("input",), "scales at run time are computed in the model's dtype"


# what config.json says


def layout(weight: Format | None, act: Format | None, alone: bool) -> str:
    """The layout of a linear's weight.

    alone: all linears have this format, and nothing else is quantized. Packed zero points are read
    by transformers (5.23) only where it may decode weights as it loads them, for which there must
    be nothing else; other asymmetric codes take a byte each.
    """
    if weight is None:
        return "dense"
    if isinstance(weight, NVFP4):
        return "nvfp4-pack-quantized"
    if isinstance(weight, MX):
        return "mxfp8-quantized" if weight.bits == 8 else f"mxfp{weight.bits}-pack-quantized"
    plain = (weight.bits == 8 and isinstance(act, Integer)) or not (weight.symmetric or alone)
    return "int-quantized" if plain else "pack-quantized"


def described(format: Format | None) -> dict | None:
    """`weights` or `input_activations` of a config group."""
    if format is None:
        return None
    about = {
        "num_bits": format.bits,
        "type": "int" if isinstance(format, Integer) else "float",
        "symmetric": format.symmetric,
    }
    about |= {
        "strategy": format.granularity,
        "group_size": format.group_size,
        "dynamic": format.role == "activation",
    }
    if isinstance(format, NVFP4):
        scale = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        local = (
            {"dynamic": "local", "observer": "static_minmax"} if format.role == "activation" else {}
        )
        return about | {"strategy": "tensor_group"} | local | scale
    if isinstance(format, MX):
        return about | {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return about | (
        {"dynamic": False, "observer": "static_minmax"} if format.range == "static" else {}
    )


# tensors


def served(dtype: torch.dtype, formats: Iterable[Format]) -> torch.dtype:
    """The dtype in which whoever loads the file computes, given that of the evaluated model and all
    formats: float16 for a float16 model of integers. transformers unpacks NVFP4 and MX weights to
    bfloat16 whatever config.json says, and float16 inputs fail on those."""
    half = dtype == torch.float16 and all(isinstance(format, Integer) for format in formats)
    return torch.float16 if half else torch.bfloat16


def weight_entries(q: QTensor, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """{entry: tensor} of a quantized weight [out, in] in layout `kind`.

    dtype: that of scales of integers.
    """
    scale, zero = q.scales.scale, q.scales.zero
    if isinstance(q.format, NVFP4):
        g = stored_global_scale(q) if isinstance(q.format, FourOverSix) else q.scales.global_scale
        return {
            "weight_packed": pack_nibbles(q.codes),
            "weight_scale": scale,
            "weight_global_scale": g,
        }
    if isinstance(q.format, MX):
        if kind == "mxfp8-quantized":
            return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        return {"weight_packed": pack_bits(q.codes, q.format.bits), "weight_scale": scale}
    offset = 0 if q.format.signed else 2 ** (q.format.bits - 1)
    codes = (q.codes.to(torch.int16) - offset).to(torch.int8)
    zero = None if zero is None else (zero - offset).to(torch.int8)
    if q.format.granularity == "tensor":
        scale, zero = scale.reshape(1), None if zero is None else zero.reshape(1)
    entries = {"weight": codes, "weight_scale": scale.to(dtype)}
    if kind == "pack-quantized":
        entries |= {
            "weight_packed": pack_words(codes, q.format.bits),
            "weight_shape": torch.tensor(q.shape),
        }
        del entries["weight"]
        if zero is not None and zero.ndim == 2:
            zero = pack_words(zero.T, q.format.bits).T
    return entries if zero is None else entries | {"weight_zero_point": zero}


def input_entries(
    format: Format | None, seen: Tensor | None, evaluated: torch.dtype
) -> dict[str, Tensor]:
    """{entry: tensor} of what is static of a linear's input. seen: SiteInput.global_scale;
    evaluated: dtype of the activations, in which a scale is computed."""
    if isinstance(format, NVFP4):
        return {
            "input_global_scale": format.global_from_amax(torch.zeros(1))
            if seen is None
            else seen.reshape(1).clone()
        }
    if not isinstance(format, Integer) or format.range != "static":
        return {}
    scales = format.scales(seen.new_zeros(1, 1, dtype=evaluated), seen)
    entries = {"input_scale": scales.scale.reshape(1)}
    if scales.zero is not None:
        offset = 0 if format.signed else 2 ** (format.bits - 1)
        entries["input_zero_point"] = (scales.zero - offset).to(torch.int8).reshape(1)
    return entries


def stored_global_scale(q: QTensor) -> Tensor:
    """g, float32 [1], with which bf16(q (s / g)) is the evaluated bf16(((q s) amax) / 1536) of
    every code q and block scale s there is: 1536 / amax, or a float32 number within a few steps of
    it. Raises DataError if none is.
    """
    rows = zip(q.scales.scale.view(torch.uint8).split(1024), q.codes.split(1024))
    pairs = (scale.int().repeat_interleave(16, -1) * 16 + codes for scale, codes in rows)
    used = sum(torch.bincount(pair.flatten(), minlength=4096) for pair in pairs).nonzero().flatten()
    codes = (used % 16).to(torch.uint8).view(-1, 1).expand(-1, 16)
    scale = (used // 16).to(torch.uint8).view(torch.float8_e4m3fn).view(-1, 1)
    wanted = QTensor(codes, replace(q.scales, scale=scale), q.format, torch.bfloat16).dequantize()
    elements = q.format.grid.decode(codes)
    start = FourOverSix.encode_multiplier(q.scales.global_scale).reshape(1)
    for step in sorted(range(-8, 9), key=abs):
        g = (start.view(torch.int32) + step).view(torch.float32)
        if torch.equal((elements * (scale.float() / g)).bfloat16(), wanted):
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
    stream = (
        codes.view(torch.uint8).unsqueeze(-1)
        >> torch.arange(bits, device=codes.device, dtype=torch.uint8)
    ) & 1
    stream = stream.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(
        -1, dtype=torch.uint8
    )


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, n] as q + 2^(bits - 1): int32 [rows, ceil(n bits / 32)]."""
    packed = pack_bits((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


# the KV cache


def cache_scheme(kv: KVCache | None, head_dim: int) -> dict | None:
    """`kv_cache_scheme`: integers in dynamic groups of a head's vector, one scale and zero point
    each. Raises ConfigError for what the layout does not hold.
    """
    if kv is None:
        return None
    for key, legal, why in (
        (
            "symmetric",
            (False,),
            "symmetric scales at run time are another multiple of the greatest magnitude",
        ),
        ("clip_k", (1.0,), "ranges at run time are the extremes"),
        ("clip_v", (1.0,), "ranges at run time are the extremes"),
        ("zp", ("rounded",), "zero points are whole numbers"),
        ("compute_dtype", ("input",), "scales at run time are computed in the model's dtype"),
        ("zp_order", ("add_then_round",), "at run time the zero point is added before rounding"),
        ("zp_range", ("signed",), "zero points at run time are signed codes"),
    ):
        if getattr(kv, key) not in legal:
            raise ConfigError(
                f"format.kv.bits={kv.bits} and format.kv.{key}={getattr(kv, key)} with "
                f"export=compressed_tensors: {why}; set format.kv.{key}={str(legal[0]).lower()}, "
                f"{WAY_OUT}."
            )
    if kv.group_size == -1:
        raise ConfigError(
            f"format.kv.bits={kv.bits} and format.kv.group_size=-1 with export=compressed_tensors: "
            f"a group lies inside one head; set format.kv.group_size=null, {WAY_OUT}."
        )
    if (why := cache_refusal()) is not None:
        raise ConfigError(
            f"format.kv.bits={kv.bits} with export=compressed_tensors: {why}; install releases "
            f"that agree (those of requirements.lock do), {WAY_OUT}."
        )
    group = kv.group_size or head_dim
    return {
        "num_bits": kv.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group,
        "dynamic": True,
    }
