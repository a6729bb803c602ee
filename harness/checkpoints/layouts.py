"""What a compressed-tensors file can hold, and what its config.json says of it.

Refused, with the setting to change, is whatever those who load the file would compute otherwise:
a weight's codes and scales stand in the file, so only their kinds matter; an activation's, and
those of keys and values, are found at run time by few rules. entries.py has the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.config.errors import ConfigError
from harness.formats import FP8, MX, NVFP4, Format, FourOverSix, Integer, KVCache
from harness.libraries.compressed_tensors import cache_refusal
from harness.transforms import ModelShape

WAY_OUT = "or use export=harness"
HELD = {"weight": (NVFP4, FourOverSix, MX, FP8, Integer), "activation": (NVFP4, MX, FP8, Integer)}
ELEMENTS = {4: ("e2m1",), 6: ("e2m3",), 8: ("e4m3",)}  # of MX, by bits


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
        yield "mx_scale", ("even", "floor", "ceil", "rceil"), "its scales are no powers of two"
    if isinstance(format, MX | FP8):
        yield "element", ELEMENTS[format.bits], "the layout has no such element"
    if isinstance(format, Integer | FP8):
        yield (
            "scale_dtype",
            ("bf16",),
            "scales are loaded in the checkpoint's dtype, so codes must come from such",
        )
    if isinstance(format, Integer):
        yield "zp", ("rounded",), "zero points are whole numbers"
        if not format.spans_zero:
            yield "incl0", ("always",), "zero points are codes, so zero lies in every range"


def _input(format: Format) -> Iterable[tuple[str, tuple, str]]:
    """(key, what it may be, why) of an activation, which others compute from these few words."""
    yield "observer", ("minmax",), "ranges at run time are the extremes"
    if not isinstance(format, FP8):  # of which refuse_padding asks for the widths
        yield "pad", ("error",), "groups divide the width"
    if isinstance(format, Integer | FP8):
        if format.range == "static":
            yield "scale_dtype", ("bf16",), "a stored scale is loaded in the checkpoint's dtype"
        else:
            yield "scale_dtype", ("float32", "input"), "scales at run time are as computed"
    if isinstance(format, Integer):
        yield from _integer_input(format)
    else:
        yield "fp4_ties", ("even",), "a tie at run time goes to the even code"
    if isinstance(format, MX | FP8):
        yield "element", ELEMENTS[format.bits], "the layout has no such element"
    if isinstance(format, NVFP4) and format.global_scale not in ("fixed", "none"):
        yield "scope", ("static",), "the global scale of an activation is stored"
    if isinstance(format, MX):
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


def _integer_input(format: Integer) -> Iterable[tuple[str, tuple, str]]:
    """The same of what integers alone have."""
    static = format.range == "static"
    yield "zp", ("rounded",), "zero points are whole numbers"
    if not static:
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


def refuse_padding(format: Format, field: str, shape: ModelShape) -> None:
    """Refuse a format that fills up the last group of an activation, where any is short."""
    for site, width in shape.widths.items():
        if format.pad == "zero" and format.group_size and width % format.group_size:
            raise ConfigError(
                f"{field}.group_size={format.group_size} with export=compressed_tensors: whoever "
                f"loads the file needs groups that divide the width {width} of {site}; take "
                f"another group, {WAY_OUT}."
            )


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
    if isinstance(weight, FP8):
        return "float-quantized"
    if weight.bits == 8 and isinstance(act, Integer):
        return "int-quantized"
    return "pack-quantized" if weight.symmetric or alone else "int-quantized"


def described(format: Format | None) -> dict | None:
    """`weights` or `input_activations` of a config group."""
    if format is None:
        return None
    about = {
        "num_bits": format.bits,
        "type": "int" if isinstance(format, Integer) else "float",
        "symmetric": format.symmetric,
        "strategy": format.granularity,
        "group_size": format.group_size,
        "dynamic": format.role == "activation",
    }
    if isinstance(format, NVFP4):
        scale = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        about["strategy"] = "tensor_group"
        if format.role == "activation":
            about |= {"dynamic": "local", "observer": "static_minmax"}
        return about | scale
    if isinstance(format, MX):
        return about | {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if format.granularity == "block":
        about |= {"group_size": None, "block_structure": [format.group_size] * 2}
    if isinstance(format, Integer | FP8) and format.range != "dynamic":
        about |= {"dynamic": False, "observer": "static_minmax"}
    return about


def config_group(
    weight: Format | None, act: Format | None, kind: str, targets: Sequence[str] = ("Linear",)
) -> dict:
    """A group of config.json: the layout and formats of the linears that are its targets."""
    return {
        "targets": list(targets),
        "weights": described(weight),
        "input_activations": described(act),
        "output_activations": None,
        "format": kind,
    }


def cache_scheme(kv: KVCache | None, head_dim: int) -> dict | None:
    """`kv_cache_scheme`: dynamic groups of a head's vector, or scales that stand in the file (FP8:
    1 with scale=unit, a layer's with scale=static). Raises ConfigError for what it does not hold.
    """
    if kv is None:
        return None
    for key, legal, why in _cache(kv):
        if getattr(kv, key) not in legal:
            wanted = "null" if legal[0] is None else str(legal[0]).lower()
            raise ConfigError(
                f"format.kv.bits={kv.bits} and format.kv.{key}={getattr(kv, key)} with "
                f"export=compressed_tensors: {why}; set format.kv.{key}={wanted}, {WAY_OUT}."
            )
    if (why := cache_refusal()) is not None:
        raise ConfigError(
            f"format.kv.bits={kv.bits} with export=compressed_tensors: {why}; install releases "
            f"that agree (those of requirements.lock do), {WAY_OUT}."
        )
    part = kv.part("key")
    about = described(part)
    assert about is not None  # a part is a format
    if part.granularity == "token":  # all of a head's vector
        about |= {"strategy": "group", "group_size": head_dim}
    return about


def _cache(kv: KVCache) -> Iterable[tuple[str, tuple, str]]:
    """(key, what it may be, why) of keys and values."""
    yield (
        "kind",
        ("integer", "fp8", "mxfp4"),
        "elements of other kinds, and NVFP4's calibrated scale, have no place in it",
    )
    if kv.kind == "integer":
        yield (
            "symmetric",
            (False,),
            "symmetric scales at run time are another multiple of the greatest magnitude",
        )
        yield "incl0", ("always",), "zero points are codes, so zero lies in every range"
        yield "clip_k", (1.0,), "ranges at run time are the extremes"
        yield "clip_v", (1.0,), "ranges at run time are the extremes"
        yield "zp", ("rounded",), "zero points are whole numbers"
        yield (
            "zp_order",
            ("add_then_round",),
            "at run time the zero point is added before rounding",
        )
        yield "zp_range", ("signed",), "zero points at run time are signed codes"
    if kv.kind != "mxfp4":  # exact in any dtype
        yield "compute_dtype", ("input",), "scales at run time are computed in the model's dtype"
    if kv.group_size == -1:
        yield "group_size", (None,), "a group lies inside one head"
    yield "key_axis", ("token",), "a scale is of one token"
    yield "window", (0,), "every token is quantized as it comes"


def refuse_linears(export: str, shape: ModelShape, experts: bool = False) -> None:
    """Refuse a model whose quantized matrices are not all linears of torch's own.

    experts: those of routed experts may be others.
    """
    if shape.structure is None:
        return
    for sites in shape.structure.sites:
        for site in sites:
            for matrix in site.matrices:
                own = experts if matrix.experts else matrix.plain
                if matrix.quantize and not own:
                    raise ConfigError(
                        f"export={export} with a {shape.structure.architecture}: {matrix.name} is "
                        "no linear that this layout has a place for; use export=harness."
                    )
