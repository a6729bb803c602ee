"""Number formats of every kind by name, and the values they are tried on."""

import pytest
import torch
from composed import ROOT

from harness.config.build import build, option
from harness.formats import FP4, FP8, MX, NVFP4, Format, FourOverSix, Integer

FORMATS = {
    "int4": Integer(),
    "int4_group": Integer(granularity="group", group_size=32),
    "int4_tensor": Integer(granularity="tensor"),
    "int4_asym": Integer(granularity="group", group_size=32, symmetric=False),
    "int8_asym_token": Integer(bits=8, granularity="token", symmetric=False, role="activation"),
    "int3_narrow": Integer(bits=3, int_range="narrow", clip=0.9),
    "int4_half_range": Integer(
        int_scale="half_range", granularity="group", group_size=16, scale_dtype="input"
    ),
    "int5_aimet": Integer(bits=5, int_scale="aimet"),
    "int4_signed": Integer(
        symmetric=False,
        zp_order="add_then_round",
        zp_range="signed",
        incl0="always",
        degenerate="eps",
    ),
    "int4_offset": Integer(
        granularity="token", symmetric=False, zp="float_offset", role="activation"
    ),
    "int4_half_offset": Integer(
        granularity="group", group_size=32, symmetric=False, zp="half_offset"
    ),
    "int4_input": Integer(
        granularity="group", group_size=32, symmetric=False, compute_dtype="input"
    ),
    "int2_mse": Integer(bits=2, observer="mse"),
    "fp4": FP4(),
    "fp4_channel_bf16": FP4(granularity="channel", group_size=None, scale_dtype="bf16"),
    "fp4_input": FP4(compute_dtype="input", fp4_ties="zero"),
    "fp8": FP8(),
    "fp8_e5m2": FP8(granularity="group", group_size=32, element="e5m2"),
    "fp8_tensor_bf16": FP8(granularity="tensor", scale_dtype="bf16"),
    "fp8_block": FP8(granularity="block", group_size=16),
    "fp8_block_mse": FP8(granularity="block", group_size=32, observer="mse"),
    "fp8_unit": FP8(granularity="tensor", range="unit"),
    "nvfp4": NVFP4(),
    "nvfp4_away": NVFP4(fp4_ties="away"),
    "nvfp4_256": NVFP4(global_scale="amax_256"),
    "nvfp4_fixed": NVFP4(global_scale="fixed"),
    "nvfp4_none": NVFP4(global_scale="none"),
    "nvfp4_token": NVFP4(scope="token", role="activation"),
    "nvfp4_input": NVFP4(compute_dtype="input"),
    "nvfp4_mse": NVFP4(observer="mse", mse_on_rounded_scale=True),
    "fouroversix": FourOverSix(),
    "fouroversix_mae": FourOverSix(choose="mae"),
    "mxfp4": MX(),
    "mxfp4_even": MX(mx_scale="even"),
    "mxfp4_ceil": MX(mx_scale="ceil"),
    "mxfp4_rceil": MX(mx_scale="rceil"),
    "mxfp4_fpquant": MX(mx_scale="fpquant"),
    "mxfp6_e2m3": MX(element="e2m3", bits=6),
    "mxfp6_e3m2": MX(element="e3m2", bits=6),
    "mxfp8_e4m3": MX(element="e4m3", bits=8, mx_scale="even", mx_even_mbits=1),
    "mxfp8_e5m2": MX(element="e5m2", bits=8),
}
# What else conf/format builds: a format that is only there is held to the same arithmetic.
for path in sorted((ROOT / "conf" / "format").glob("*.yaml")):
    weight = build(option("format", path.stem)["weight"], "format.weight", Format)
    if weight is not None and all(type(weight) is not type(own) for own in FORMATS.values()):
        FORMATS[path.stem] = weight
BLOCK_MX = (
    "mxfp4",
    "mxfp4_even",
    "mxfp4_ceil",
    "mxfp4_rceil",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
)
FP8_WEIGHTS = {
    "tensor": FP8(granularity="tensor"),
    "channel": FP8(),
    "group": FP8(granularity="group", group_size=32),
    "block": FP8(granularity="block", group_size=64),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def named(*names):
    return pytest.mark.parametrize(
        "format", [pytest.param(FORMATS[name], id=name) for name in names or FORMATS]
    )


def data(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.exp2(torch.randn(*shape[:-1], 1, generator=g))
    return (x * (1 + 30 * (torch.rand(*shape, generator=g) < 0.01))).to(dtype)


def extremes(dtype):
    """{name: [4, 96]} of values at the ends of a dtype: none, subnormal, tiny, great, and all of
    them side by side."""
    info, noise = torch.finfo(dtype), data(4, 96)
    least = info.smallest_normal * info.eps
    rows = {
        "zeros": torch.zeros(4, 96, dtype=dtype),
        "subnormal": (torch.arange(-192, 192).view(4, 96).double() * least / 32).to(dtype),
        "tiny": (noise.double() * info.smallest_normal).to(dtype),
        "one huge value": noise.to(dtype).index_fill_(1, torch.tensor([40]), info.max / 16),
    }
    return rows | {"mixed": torch.stack([row[2] for row in rows.values()])}


def identical(a, b):
    """The same bits, sign of zero included (NaN aside)."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))
    assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


def blocks_of(format, x):
    return x.reshape(*x.shape[:-1], -1, format.group(x.shape[-1]))
