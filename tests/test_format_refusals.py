"""Formats that cannot be are refused by the field that is wrong, widths that groups do not divide
before weights exist."""

from dataclasses import replace

import pytest
import torch

from harness.config.errors import ConfigError
from harness.formats import FP4, MX, NVFP4, FourOverSix, Integer, KVCache, Scheme


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NVFP4(symmetric=False), "symmetric=false"),
        (lambda: MX(symmetric=False), "symmetric=false"),
        (lambda: FP4(symmetric=False), "symmetric=false"),
        (lambda: NVFP4(group_size=32), "group_size=32"),
        (lambda: MX(group_size=16), "group_size=16"),
        (lambda: NVFP4(granularity="channel", group_size=None), "granularity=group, group_size=16"),
        (lambda: NVFP4(bits=8), "bits=8"),
        (lambda: MX(element="e4m3", bits=4), "bits=4"),
        (lambda: Integer(bits="abc"), "Integer: bits=abc"),
        (lambda: Integer(bits=True), "bits=True"),
        (lambda: Integer(bits=1), "bits=1"),
        (lambda: Integer(bits=16), "Legal: 2, 3, 4, 5, 6, 7, 8"),
        (lambda: Integer(bits=4.0), "bits=4.0"),
        (lambda: Integer(symmetric="no"), "symmetric=no"),
        (lambda: Integer(granularity="row"), "tensor, channel, token, group"),
        (lambda: Integer(granularity="group"), "a group needs a size"),
        (lambda: Integer(granularity="channel", group_size=64), "contradicts"),
        (lambda: Integer(granularity="token"), "granularity=channel"),
        (
            lambda: FP4(granularity="channel", group_size=None, role="activation"),
            "granularity=token",
        ),
        (lambda: Integer(granularity="group", group_size=0), "group_size=0"),
        (lambda: Integer(clip=0.0), "clip=0.0"),
        (lambda: Integer(clip=1.5), "clip=1.5"),
        (lambda: Integer(zp="float_offset"), "symmetric=false"),
        (
            lambda: Integer(symmetric=False, zp_range="signed", incl0="never"),
            "incl0=never with zp_range=signed",
        ),
        (lambda: Integer(int_scale="max"), "qmax, half_range, aimet"),
        (lambda: Integer(scale_dtype="fp8"), "scale_dtype=fp8"),
        (lambda: MX(mx_scale="round"), "floor, ceil, even, rceil, fpquant"),
        (lambda: MX(element="e4m4"), "element=e4m4"),
        (lambda: MX(mx_even_mbits=True), "mx_even_mbits=True"),
        (lambda: NVFP4(fp4_ties="up"), "even, zero, away"),
        (lambda: NVFP4(scope="static"), "scope=static"),
        (lambda: NVFP4(global_scale="max"), "amax, amax_256, fixed, none"),
        (lambda: FourOverSix(choose="max"), "mse, mae, abs_max"),
        (lambda: FourOverSix(observer="mse"), "observer=mse"),
        (lambda: FourOverSix(global_scale="amax"), "global_scale=amax"),
        (lambda: Integer(observer="percentile"), "minmax, mse"),
        (lambda: Integer(mse={"steps": 3}), "Integer: mse.steps"),
        (lambda: Integer(mse={"norm": "two"}), "Integer: mse.norm=two"),
        (lambda: Integer(compute_dtype="bf16"), "float32, input"),
        (lambda: KVCache(bits=9), "KVCache: bits=9"),
        (lambda: KVCache(clip_k=0), "clip_k=0"),
        (lambda: KVCache(group_size=-2), "group_size=-2"),
        (lambda: Scheme(weight=NVFP4(role="activation")), "weight.role=activation"),
        (
            lambda: Scheme(overrides={(0, "down_proj"): {"activation": None}}),
            "activation is not a part",
        ),
        (lambda: NVFP4().fake(torch.zeros(2, 40)), "does not divide the width 40"),
    ],
)
def test_refusals_name_the_field(build, message):
    with pytest.raises(ConfigError) as refusal:
        build()
    assert message in str(refusal.value)


def test_widths_are_checked_before_weights_exist():
    format = Integer(granularity="group", group_size=7)
    with pytest.raises(ConfigError) as refusal:
        format.check(576, "format.weight.group_size", "layers.0.o_proj")
    for part in (
        "format.weight.group_size=7",
        "layers.0.o_proj",
        "576",
        " 64,",
        "format.weight.pad=zero",
    ):
        assert part in str(refusal.value)
    format.check(49, "format.weight.group_size", "layers.0.o_proj")
    replace(format, pad="zero").check(576, "format.weight.group_size", "layers.0.o_proj")
