"""The grid search of LLM Compressor: only the ranges it chose are on file."""

import re
from dataclasses import replace

import torch
from references.agreement import blockwise, exactly
from references.integers import compressed_tensors_format

from harness.formats import MSE, MX, NVFP4, error


def llmcompressor(x, golden, kind):
    search = {"observer": "mse", "mse": MSE(maxshrink=0.2, patience=5), "compute_dtype": "input"}
    if kind == "nvfp4":
        format = NVFP4(**search)
    elif kind == "mxfp4":
        format = MX(mx_scale="even", mse_on_rounded_scale=True, **search)
    else:
        bits, symmetry, granularity, group = re.fullmatch(
            r"int(\d)_(sym|asym)_(group|channel)(\d*)", kind
        ).groups()
        format = replace(compressed_tensors_format(bits, symmetry, granularity, group), **search)
    g = NVFP4(compute_dtype="input").scales(x).global_scale
    ours = format.quantize(x, global_scale=g)
    half = format.group(x.shape[-1]) // 2
    ends = (
        torch.stack([golden["min"], golden["max"]], dim=-1)
        .flatten(-2)
        .repeat_interleave(half, dim=-1)
    )
    theirs = format.quantize(x, replace(format, observer="minmax").scales(ends, global_scale=g))
    blocks, dq, dq_theirs = (
        blockwise(t.float(), 2 * half) for t in (x, ours.dequantize(), theirs.dequantize())
    )
    e, e_theirs = error(blocks, dq, format.mse.norm), error(blocks, dq_theirs, format.mse.norm)
    same = format.lattice(ours.scales)[0] == format.lattice(theirs.scales)[0]
    exactly(dq[same], dq_theirs[same], "dq of the same range")
    torch.testing.assert_close(e[~same], e_theirs[~same], rtol=1e-6, atol=0)
