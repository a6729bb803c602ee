"""The formats of FP-Quant, as its forward passes them straight through."""

import re

import torch
from references.agreement import blockwise, check_searched, exactly

from harness.formats import FP4, MSE, MX, NVFP4, Integer, Scales, absmax, straight_through


def fpquant(x, golden, kind, observer):
    shared = {
        "observer": observer,
        "mse": MSE(shrink="scale"),
        "compute_dtype": "input",
        "role": "activation",
    }
    if kind == "mxfp4":
        format = MX(mx_scale="fpquant", **shared)
    elif kind.startswith("fp4"):
        format = FP4(group_size=int(kind.partition("group")[2]), **shared)
    else:
        symmetric, group = re.fullmatch(r"int4_(sym|asym)_group(\d+)", kind).groups()
        format = Integer(
            symmetric=symmetric == "sym",
            granularity="group",
            group_size=int(group),
            int_scale="half_range",
            zp_order="add_then_round",
            incl0="never",
            degenerate="one",
            **shared,
        )
    q = format.quantize(x)
    if observer == "mse" and kind != "mxfp4":
        check_searched(format, x, {**golden, "ste": True})
        return
    exactly(format.lattice(q.scales, x.dtype)[0], golden["scale"], "scale")
    if q.scales.zero is not None:
        exactly(q.scales.zero, golden["zero_point"], "zero point")
    exactly(straight_through(x, q.dequantize()), golden["dq"], "dq")
    exactly(format.fake(x, ste=True), golden["dq"], "fake")


def fpquant_nvfp4(x, golden, observer):
    """Same bytes from the same g; eff = s * (1 / g) in x's dtype, and 1 where s = 0."""
    format = NVFP4(
        compute_dtype="input", observer=observer, mse=MSE(shrink="scale"), role="activation"
    )
    torch.testing.assert_close(
        format.scales(x.float()).global_scale, golden["global_scale"], rtol=1e-6, atol=0
    )
    scales = format.scales(x, global_scale=golden["global_scale"])
    flushed = golden["scale"] == 1
    (eff,) = format.lattice(scales)
    assert (absmax(blockwise(x, 16))[flushed] <= eff[flushed] / 4).all()
    last_bit = 1e-6 if x.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        golden["scale"][~flushed].float(), eff[~flushed], rtol=last_bit, atol=0
    )
    elements = FP4(group_size=16, compute_dtype="input", role="activation")
    dq = elements.quantize(x, Scales(golden["scale"])).dequantize()
    exactly(straight_through(x, dq), golden["dq"], "dq")
