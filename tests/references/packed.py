"""Packed checkpoints of compressed-tensors."""

import re

import torch
from references.agreement import exactly
from references.integers import compressed_tensors_format

from harness.checkpoints.entries import pack_words
from harness.formats import MX, NVFP4, unpack_nibbles


def packed(x, golden, kind):
    """Bytes of the file, and the weight its loader returns."""
    if kind == "nvfp4":
        format = NVFP4(compute_dtype="input")
    elif kind == "mxfp4":
        format = MX(mx_scale="even", compute_dtype="input")
    else:
        bits, symmetry, granularity, group = re.fullmatch(
            r"int(\d)_(sym|asym)_(group|channel)(\d*)", kind
        ).groups()
        format = compressed_tensors_format(bits, symmetry, granularity, group)
    q = format.quantize(x)
    if "weight_shape" in golden:
        exactly(torch.tensor(q.shape), golden["weight_shape"], "shape")
        exactly(pack_words(q.codes, format.bits), golden["weight_packed"], "packed")
        exactly(q.scales.scale, golden["weight_scale"], "scale")
        if "weight_zero_point" in golden:
            exactly(
                pack_words(q.scales.zero.T.to(torch.int8), format.bits).T,
                golden["weight_zero_point"],
                "zero point",
            )
    else:
        exactly(q.state()["codes"], golden["weight_packed"], "packed")
        exactly(unpack_nibbles(golden["weight_packed"], x.shape[-1]), q.codes, "unpacked")
        exactly(q.scales.scale.view(torch.uint8), golden["weight_scale"], "scale")
        if "weight_global_scale" in golden:
            exactly(q.scales.global_scale, golden["weight_global_scale"], "global scale")
    weight = golden["roundtrip_weight"]
    exactly(format.decode(q.codes, q.scales).to(weight.dtype), weight, "loaded weight")
