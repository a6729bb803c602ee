"""Casts to small floats, and FP8 as torch and compressed-tensors have it."""

import pytest
import torch
from references.agreement import exactly

from harness.formats import E2M1, E2M3, E3M2, E4M3, FP8

GRIDS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3}


def cast(x, golden, grid, reference):
    if grid not in GRIDS:
        pytest.skip(f"{grid} is not an element grid")
    grid = GRIDS[grid]
    q = grid.round_(x.clone())
    codes = grid.encode(q, x < 0)
    exactly(grid.decode(codes), q, "decode of encode")
    if "code" in golden:
        signed_zero = (x == 0) & (reference != "modelopt")  # others keep the sign of -0.0
        exactly(codes[~signed_zero], golden["code"][~signed_zero], "code")
        exactly(codes[signed_zero], golden["code"][signed_zero] % 8, "code of zero")
    if "dq" in golden:
        beyond = torch.zeros_like(x, dtype=torch.bool)
        if reference == "fouroversix":
            beyond = x.abs() >= 7
            exactly(
                golden["dq"][beyond].abs().clamp(max=grid.max),
                torch.full_like(x[beyond], grid.max),
                "unclamped values",
            )
        elif reference.endswith("unclamped"):
            beyond = golden["dq"].isnan()
            assert (x[beyond] > 464).all()
        exactly(q[~beyond], golden["dq"][~beyond], "dq")


def fp8(x, golden, element, part, granularity, group):
    format = FP8(
        element=element,
        granularity=granularity,
        group_size=int(group) if group else None,
        role="weight" if part == "w" else "activation",
        compute_dtype="input",
        scale_dtype="input",
    )
    q = format.quantize(x)
    exactly(q.scales.scale.flatten(), golden["scale"].flatten(), "scale")
    if "code" in golden:  # but of a zero, whose sign is lost there where a quotient underflows
        some = golden["code"] & 0x7F != 0
        exactly(q.codes[some], golden["code"][some], "code")
        exactly(q.codes[~some] & 0x7F, golden["code"][~some] & 0x7F, "code of zero")
    exactly(q.dequantize(), golden["dq"], "dq")
    exactly(format.fake(x), golden["dq"], "fake")


def fp8_unit(x, golden, element):
    format = FP8(element=element, granularity="tensor", range="unit", role="activation")
    exactly(format.fake(x), golden["dq"], "fake")
    some = x != 0  # others keep the sign of -0.0
    exactly(format.quantize(x).codes[some], golden["code"][some], "code")
