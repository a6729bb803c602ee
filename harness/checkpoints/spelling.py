"""How methods and formats are spelled in the names of checkpoints, which names.py puts together.

A method is spelled as its paper has it, QuaRot. An integer format is its bits, 16 is not quantized,
a floating format is its word: nvfp4, fouroversix, if4, fp4, fp8, mxfp4, mxfp6, mxfp8 (fp8.e5m2,
mxfp6.e3m2, mxfp8.e5m2); mixed4: single linears differ from 4.

Imports no torch before there is a format to spell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.formats import Format, Scheme

ELEMENTS = {"e2m1": "mxfp4", "e2m3": "mxfp6", "e4m3": "mxfp8"}
SPELLING = {  # where more than the first letter is a capital
    "adacodec": "AdaCodec",
    "adascale": "AdaScale",
    "awq": "AWQ",
    "dartquant": "DartQuant",
    "dct": "DCT",
    "dst": "DST",
    "faar": "FAAR",
    "flatquant": "FlatQuant",
    "gptq": "GPTQ",
    "gsr": "GSR",
    "jointquant": "JointQuant",
    "jq": "JQ",
    "minmax": "MinMax",
    "pca": "PCA",
    "quarot": "QuaRot",
    "rht": "RHT",
    "rtn": "RTN",
    "signround": "SignRound",
    "smoothquant": "SmoothQuant",
    "spinquant": "SpinQuant",
    "wush": "WUSH",
}


def spelled(option: str) -> str:
    """An option of transform, solver or tune as its method is spelled: jq_seed is JQSeed."""
    return "".join(SPELLING.get(part) or part.capitalize() for part in option.split("_"))


def word(format: Format | None) -> int | str:
    """The bits of an integer format, the word of another, 16 for none."""
    if format is None:
        return 16
    from harness.formats import FP8, MX, Integer  # torch, which a name can be parsed without

    if type(format) is Integer:
        return format.bits
    if type(format) is MX:
        return ELEMENTS.get(format.element) or f"mxfp{format.bits}.{format.element}"
    if type(format) is FP8 and format.element != "e4m3":
        return f"fp8.{format.element}"
    kind = type(format).__name__.lower()
    return kind if kind == "fouroversix" or kind[-1].isdigit() else f"{kind}{format.bits}"


def group_of(format: Format | None) -> int | str | None:
    """Elements a scale of the weights; None is one a channel."""
    if format is not None and format.granularity == "tensor":
        return "tensor"
    if format is not None and format.granularity == "block":
        return f"{format.group_size}x{format.group_size}"
    return None if format is None else format.group_size


def mixed(scheme: Scheme, part: str) -> int | str:
    """The word of all linears' format.

    Where single linears of the blocks have another one, it says so.
    """
    formats = [
        parts[part]
        for (layer, _), parts in scheme.overrides.items()
        if layer is not None and part in parts
    ]
    common = getattr(scheme, part)
    same = all(_unclipped(format) == _unclipped(common) for format in formats)
    return word(common) if same else f"mixed{word(common)}"


def _unclipped(format: Format | None) -> Format | None:
    """The format without a ratio that a transform may have learned, which a name does not know."""
    from harness.formats import Integer

    return replace(format, clip=1.0) if isinstance(format, Integer) else format
