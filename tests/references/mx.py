"""MX in five libraries, and where their scales differ."""

from dataclasses import replace

import torch
from references.agreement import blockwise, check_format, exactly

from harness.formats import MX, Scales, absmax


def mx_format(element, rule):
    bits = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8}[element]
    return MX(element=element, bits=bits, mx_scale=rule)


def mx_exact(x, golden, rule, element="e2m1"):
    check_format(mx_format(element, rule), x.float(), golden)


def mx_compressed_tensors(x, golden, element="e2m1"):
    mbits = 1 if element == "e4m3" else "element"
    check_format(
        replace(mx_format(element, "even"), mx_even_mbits=mbits, compute_dtype="input"), x, golden
    )


def mx_torchao(x, golden, rule, element="e2m1"):
    """Exact; at k = 0 torchao divides by another scale (2^-126, with rceil 1) than it multiplies
    with. torchao's rceil scale may be one low, where amax / max is within a few ulp above a power
    of two."""
    x, format, theirs = x.float(), mx_format(element, rule), golden["scale"]
    scales = format.scales(x)
    low = scales.scale.int() - theirs.int()
    exactly(
        torch.where(low == 1, theirs, scales.scale) if rule == "rceil" else scales.scale,
        theirs,
        "scale",
    )
    if (low == 1).any():
        (power,) = format.lattice(Scales(theirs))
        peak = absmax(blockwise(x, 32)) / format.grid.max
        assert (peak <= power * (1 + 2**-20))[low == 1].all(), (
            "a scale differs away from a power of two"
        )
    divide = torch.where(theirs == 0, 127 if rule == "rceil" else 1, theirs).to(torch.uint8)
    exactly(format.decode(format.encode(x, Scales(divide)), Scales(theirs)), golden["dq"], "dq")
    ordinary = ((theirs > 0) & (low == 0)).repeat_interleave(32, dim=-1)
    exactly(torch.where(ordinary, format.fake(x), golden["dq"]), golden["dq"], "fake")


def mx_fouroversix(x, golden):
    """Exact but for NaN on all-zero blocks, and code 1 where the scale would be 2^-127."""
    x, format, theirs = x.float(), MX(mx_scale="rceil"), golden["scale"]
    scales = format.scales(x)
    tiny = scales.scale == 0
    exactly(scales.scale[~tiny], theirs[~tiny], "scale")
    zero = (absmax(blockwise(x, 32)) == 0).repeat_interleave(32, dim=-1)
    assert golden["dq"][zero].isnan().all()
    assert (theirs[tiny] <= 1).all()
    exactly(format.quantize(x, Scales(theirs)).dequantize()[~zero], golden["dq"][~zero], "dq")


def mx_modelopt(x, golden):
    """rceil scales through log2, as torchao's; every element tie toward zero."""
    x, format, theirs = x.float(), MX(mx_scale="rceil", fp4_ties="zero"), golden["scale"]
    low = format.scales(x).scale.int() - theirs.int()
    assert ((low == 0) | (low == 1)).all()
    exactly(format.quantize(x, Scales(theirs)).dequantize(), golden["dq"], "dq")
