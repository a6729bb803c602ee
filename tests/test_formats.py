"""Properties every number format has, on data of several dtypes and shapes."""

from dataclasses import replace

import pytest
import torch
from composed import ROOT

from harness.config.build import build, option
from harness.config.errors import ConfigError, DataError
from harness.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP4,
    FP8,
    MSE,
    MX,
    NVFP4,
    Format,
    FourOverSix,
    Integer,
    KVCache,
    QTensor,
    Scales,
    Scheme,
    error,
    pack_nibbles,
    unpack_nibbles,
)

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
CLIPPING = (
    "int5_aimet",
    "int4_half_range",
    "int2_mse",
)  # reach the least code, which has no positive twin
SYMMETRIC = [name for name, format in FORMATS.items() if format.symmetric and name not in CLIPPING]
ACTIVATIONS = {
    name: replace(format, role="activation")
    for name, format in FORMATS.items()
    if format.granularity not in ("channel", "block")
} | {
    "fp4_tensor": FP4(granularity="tensor", group_size=None, role="activation"),
    "fouroversix_token": FourOverSix(scope="token", role="activation"),
    "fp8_token": FP8(granularity="token", role="activation"),
    "fp8_static": FP8(granularity="tensor", range="static", role="activation"),
    "nvfp4_static": NVFP4(scope="static", role="activation"),
    "int8_static": Integer(bits=8, granularity="tensor", range="static", role="activation"),
    "int2_static_mse": Integer(
        bits=2, granularity="tensor", range="static", observer="mse", role="activation"
    ),
    "int4_token_mse": Integer(granularity="token", observer="mse", role="activation"),
    "int4_token_patient": Integer(
        granularity="token", observer="mse", mse=MSE(patience=1), role="activation"
    ),
}


def named(*names):
    return pytest.mark.parametrize(
        "format", [pytest.param(FORMATS[name], id=name) for name in names or FORMATS]
    )


def data(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.exp2(torch.randn(*shape[:-1], 1, generator=g))
    return (x * (1 + 30 * (torch.rand(*shape, generator=g) < 0.01))).to(dtype)


@pytest.mark.parametrize("format", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_text_is_read_without_its_neighbours_unless_a_scale_spans_tokens(format):
    text, other = data(1, 1, 96), 40 * data(1, 9, 96, seed=1)
    seen = format.calibrated(*torch.aminmax(text)) if format.needs_static else None
    alone = format.fake(text, global_scale=seen)
    beside = format.fake(torch.cat([text, other], 1), global_scale=seen)[:, :1]
    assert torch.equal(alone, beside) != format.spans_tokens


def identical(a, b):
    """The same bits, sign of zero included (NaN aside)."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))
    assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


def blocks_of(format, x):
    return x.reshape(*x.shape[:-1], -1, format.group(x.shape[-1]))


# one lattice, four maps


@named()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (7, 64), (3, 5, 160), (1, 32), (330, 416)])
def test_fake_is_quantize_then_dequantize(format, dtype, shape):
    x = data(*shape, dtype=dtype)
    x.view(-1)[:: max(7, x.shape[-1] // 3)] = -0.0
    identical(format.fake(x), format.quantize(x).dequantize())


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


INPUT = {
    f"{name}, input": replace(format, compute_dtype="input")
    for name, format in FORMATS.items()
    if format.compute_dtype == "float32" and not isinstance(format, FourOverSix)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*FORMATS, *INPUT])
def test_fake_is_quantize_then_dequantize_at_the_ends_of_a_dtype(name, dtype):
    format = (FORMATS | INPUT)[name]
    for values, x in extremes(dtype).items():
        dq = format.fake(x)
        identical(dq, format.quantize(x).dequantize())
        overflows = (
            isinstance(format, FourOverSix) and dtype != torch.float16
        )  # 1536 amax, its reference's order of products
        assert overflows or dq.isfinite().all(), values
        assert values != "zeros" or (dq == 0).all()


@named(*BLOCK_MX)
def test_mx_elements_in_float32_are_those_in_bfloat16(format):
    """Powers of two: every quotient and product is as exact in the model's own dtype, as serving
    engines compute it."""
    for x in (*extremes(torch.bfloat16).values(), data(64, 96, dtype=torch.bfloat16)):
        blocks, (scale,) = blocks_of(format, x), format.lattice(format.scales(x), torch.bfloat16)
        own = format.grid.round_(blocks / scale.unsqueeze(-1), format.fp4_ties) * scale.unsqueeze(
            -1
        )
        identical(replace(format, compute_dtype="input").fake(x), own.flatten(-2))


@named()
def test_views_and_transposes_are_read_in_place(format):
    x = data(64, 9, 4).transpose(0, 2)
    before = x.clone()
    identical(format.fake(x), format.fake(x.contiguous()))
    assert torch.equal(x, before)


@named()
def test_padding_adds_zeros_that_are_not_stored(format):
    if format.granularity != "group":
        pytest.skip("one group over the whole axis needs no padding")
    x, padded = data(6, 50), torch.nn.functional.pad(data(6, 50), (0, -50 % format.group_size))
    q = replace(format, pad="zero").quantize(x)
    assert q.codes.shape == x.shape
    identical(q.dequantize(), format.quantize(padded).dequantize()[:, :50])
    identical(replace(format, pad="zero").fake(x), q.dequantize())


@named()
def test_snapped_values_are_representable(format):
    w, other = data(40, 128), 3 * data(40, 128, seed=1)
    scales = format.scales(w)
    for values in (w, other):  # other: what error feedback makes of w
        blocks = format.split(values)
        snapped = format.join(
            format.snap(blocks, *(t.unsqueeze(-1) for t in format.lattice(scales))), values.shape
        )
        codes = format.encode(snapped, scales)
        identical(format.decode(codes, scales), snapped)
        identical(format.quantize(values, scales).dequantize(), snapped)


@named()
def test_columns_snap_like_the_matrix(format):
    if format.compute_dtype == "input":
        pytest.skip("columns of a float32 working copy")
    w = data(40, 128)
    scales = format.scales(w)
    lattice = [format.per_row(t, len(w)) for t in format.lattice(scales)]
    group = format.group(w.shape[-1])
    columns = w.clone()
    for j in range(w.shape[-1]):
        column = columns[:, j].clone()
        assert format.snap(column, *(t[:, j // group] for t in lattice), out=column) is column
        columns[:, j] = column
    identical(columns, format.quantize(w, scales).dequantize())


@named("int4_group", "int4_asym", "fp4", "nvfp4", "fouroversix", "mxfp4")
def test_groups_can_be_observed_one_at_a_time(format):
    w = data(8, 128)
    whole = format.scales(w)
    parts = [format.scales(part, whole.global_scale) for part in w.split(format.group_size, dim=-1)]
    assert torch.equal(
        torch.cat([part.scale.float() for part in parts], dim=-1), whole.scale.float()
    )
    if whole.zero is not None:
        assert torch.equal(torch.cat([part.zero for part in parts], dim=-1), whole.zero)


@named()
def test_codes_are_in_range_and_counted(format):
    q = format.quantize(data(16, 64))
    least, greatest = int(q.codes.min()), int(q.codes.max())
    assert least >= -(2 ** (format.bits - 1)) * format.signed
    assert greatest < 2 ** (format.bits - format.signed)
    groups = q.scales.scale.numel()
    halves = dict.fromkeys((torch.bfloat16, torch.float16), 16)
    width = ({torch.float32: 32} | halves).get(q.scales.scale.dtype, 8)
    stored = {"float_offset": 32, "half_offset": 16}
    zero = 0 if format.symmetric else stored.get(format.zp, format.bits)
    shared = 0 if q.scales.global_scale is None else 32 * q.scales.global_scale.numel()
    assert q.bits() == 16 * 64 * format.bits + groups * (width + zero) + shared


@named()
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 160)])
def test_state_round_trip(format, shape):
    q = format.quantize(data(*shape, dtype=torch.bfloat16))
    state = q.state()
    assert state["codes"].numel() == q.codes.numel() // (2 if format.bits <= 4 else 1)
    back = QTensor.from_state(format, state, shape, q.dtype)
    assert torch.equal(back.codes, q.codes)
    identical(back.dequantize(), q.dequantize())


# invariants of the arithmetic


@named("fp4", "int4", "int4_group", "int4_tensor", *BLOCK_MX)
def test_requantizing_changes_nothing(format):
    dq = format.fake(data(64, 256))
    identical(format.fake(dq), dq)


@named("int4_asym", "int8_asym_token", "nvfp4")
def test_requantizing_moves_the_last_bit_at_most(format):
    x = data(64, 256)
    q = format.quantize(x)
    dq = q.dequantize()
    moved = (format.fake(dq) - dq).abs()
    if isinstance(format, NVFP4):
        unit, moved = (
            dq.abs(),
            moved.masked_fill((q.scales.scale.float() < 2**-6).repeat_interleave(16, dim=-1), 0),
        )
    else:
        blocks = blocks_of(format, dq)
        unit = (
            (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True))
            .expand_as(blocks)
            .reshape(dq.shape)
        )
    assert (moved <= torch.nextafter(unit, torch.tensor(torch.inf)) - unit).all()


@named(*SYMMETRIC)
def test_sign_symmetry(format):
    x = data(32, 128)
    assert torch.equal(format.fake(-x), -format.fake(x))


@named()
def test_zero_stays_zero(format):
    zeros = torch.zeros(4, 64)
    identical(format.fake(zeros), zeros)
    identical(format.fake(-zeros), zeros)
    x = data(4, 64)
    x[1] = 0
    assert (format.fake(x)[1] == 0).all()


@named("int4_group", "int4_asym", "fp4", "nvfp4", "fouroversix", *BLOCK_MX)
def test_permuting_groups_permutes_the_result(format):
    x = data(16, 256)
    order = torch.randperm(256 // format.group_size, generator=torch.Generator().manual_seed(3))
    permuted = blocks_of(format, x)[:, order].flatten(-2)
    identical(format.fake(permuted), blocks_of(format, format.fake(x))[:, order].flatten(-2))


@named("fp4", "nvfp4", "nvfp4_token", "nvfp4_256", "fouroversix", *BLOCK_MX)
@pytest.mark.parametrize("k", [-9, 1, 14])
def test_powers_of_two_pass_through(format, k):
    x = data(32, 128)
    identical(format.fake(x * 2.0**k), format.fake(x) * 2.0**k)


@named(
    "int4",
    "int4_group",
    "int4_asym",
    "int8_asym_token",
    "int4_offset",
    "int5_aimet",
    "int4_half_range",
)
def test_integer_error_is_at_most_half_a_step(format):
    x = data(32, 128)
    q = format.quantize(x)
    inside = (q.codes > format.qmin) & (q.codes < format.qmax)
    off = blocks_of(format, (q.dequantize() - x).abs().masked_fill(~inside, 0))
    slack = 1.0 if format.zp_order == "round_then_add" and not format.symmetric else 0.5
    assert (off <= q.scales.scale.unsqueeze(-1) * slack * (1 + 1e-5)).all()


def test_asymmetric_groups_far_from_zero_keep_their_resolution():
    x = 100 + data(8, 64) / 50
    dq = Integer(granularity="group", group_size=32, symmetric=False).fake(x)
    assert (dq - x).abs().max() < 0.2 * (x.amax() - x.amin())
    constant = torch.full((2, 32), 0.375)
    for role in ("weight", "activation"):
        format = Integer(granularity="group", group_size=32, symmetric=False, role=role)
        torch.testing.assert_close(format.fake(constant), constant, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [-0.5, 0.5, 0.0])
@pytest.mark.parametrize(
    "knobs",
    [
        {"zp_range": "signed"},
        {"zp_range": "signed", "zp_order": "add_then_round"},
        {"zp_range": "signed", "incl0": "always"},
        {"zp_range": "unsigned", "incl0": "always"},
        {"zp_range": "signed", "role": "activation"},
        {"zp_range": "signed", "scale_dtype": "bf16", "degenerate": "eps"},
        {"zp_range": "signed", "granularity": "channel", "group_size": None},
        {"zp_range": "signed", "granularity": "tensor", "group_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_are_codes_keep_groups_on_one_side_of_zero(bits, knobs, side):
    """Zero lies in the range of each group, so no code is lost to a zero point that had to be
    clamped."""
    x = side + data(16, 64) / 500
    format = Integer(
        bits=bits, symmetric=False, **{"granularity": "group", "group_size": 32} | knobs
    )
    q = format.quantize(x)
    assert q.scales.zero.min() >= format.qmin and q.scales.zero.max() <= format.qmax
    step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / (2**bits - 1)
    assert (q.dequantize() - x).abs().max() <= step * 1.01


@pytest.mark.parametrize("zp_range", ["signed", "unsigned"])
@pytest.mark.parametrize("shrink", ["range", "scale"])
def test_searched_zero_points_are_codes_too(shrink, zp_range):
    x = data(32, 64).abs()
    for side in (x, -x):
        format = Integer(
            granularity="group", group_size=32, symmetric=False, incl0="always", zp_range=zp_range
        )
        searched = replace(format, observer="mse", mse={"shrink": shrink})
        zero = searched.scales(side).zero
        assert zero.min() >= format.qmin and zero.max() <= format.qmax
        e, e_minmax = (error(side, own.fake(side), 2.4).sum() for own in (searched, format))
        assert e < e_minmax


def test_float_offsets_and_unsigned_groups_need_no_zero():
    x = 0.5 + data(16, 64) / 500
    for knobs in (
        {},
        {"incl0": "never"},
        {"zp": "float_offset", "zp_range": "signed", "incl0": "never"},
    ):
        format = Integer(bits=8, granularity="group", group_size=32, symmetric=False, **knobs)
        assert (format.fake(x) - x).abs().max() <= (x.amax() - x.amin()) / 255


def test_scales_in_the_models_dtype():
    w = data(8, 128, dtype=torch.bfloat16)
    format = Integer(scale_dtype="input")
    assert format.scales(w).scale.dtype == torch.bfloat16
    assert torch.equal(format.scales(w.float(), dtype=torch.bfloat16).scale, format.scales(w).scale)
    q = format.quantize(w.float(), dtype=torch.bfloat16)
    identical(q.dequantize(), format.fake(w))


# observers


@named("int4", "int4_asym", "fp4", "nvfp4", "mxfp4_even")
@pytest.mark.parametrize("shrink", ["range", "scale"])
def test_grid_search_never_loses_to_the_extremes(format, shrink):
    x = data(32, 128)
    rounded = {"mse_on_rounded_scale": True} if hasattr(format, "mse_on_rounded_scale") else {}
    searched = replace(format, observer="mse", mse={"shrink": shrink, "maxshrink": 0.8}, **rounded)
    e = error(blocks_of(format, x), blocks_of(format, searched.fake(x)), 2.4)
    e_minmax = error(blocks_of(format, x), blocks_of(format, format.fake(x)), 2.4)
    assert (e <= e_minmax * (1 + 1e-5)).all()
    assert e.sum() < e_minmax.sum()


def test_search_grids():
    assert MSE().factors[0] == 1
    assert len(MSE().factors) == 80
    assert MSE().factors[-1] == pytest.approx(0.21)
    assert len(MSE(shrink="scale").factors) == 100
    assert MSE(shrink="scale").factors[-1] == pytest.approx(0.208)
    expanded = MSE(maxshrink=0.555, grid=200, expand=1.8, patience=1000).factors
    assert len(expanded) == 111
    assert expanded[0] == 1.8


def test_patience_ends_the_search():
    x = data(16, 64)
    impatient = replace(FORMATS["int2_mse"], mse={"patience": 1})
    e, e_all = (error(x, format.fake(x), 2.4).sum() for format in (impatient, FORMATS["int2_mse"]))
    assert e >= e_all


def test_four_over_six_takes_the_better_candidate():
    x = data(32, 128)
    for choose, norm in (("mse", 2.0), ("mae", 1.0)):
        format = FourOverSix(choose=choose)
        chosen = format.quantize(x)
        six = NVFP4(global_scale="amax_256").scales(x).scale
        only_six = format.quantize(x, Scales(six, None, chosen.scales.global_scale)).dequantize()
        e, e_six = (
            error(blocks_of(format, x), blocks_of(format, dq), norm)
            for dq in (chosen.dequantize(), only_six)
        )
        assert (e <= e_six * (1 + 1e-5)).all()
        assert (chosen.scales.scale.float() != six.float()).any()


# global scales


@named("nvfp4_token")
def test_a_scale_per_token_keeps_tokens_apart(format):
    x = data(3, 5, 64)
    identical(format.fake(x)[1, 2], format.fake(x[1, 2]))


@pytest.mark.parametrize(
    "format",
    [NVFP4(role="activation", scope="static"), FourOverSix(role="activation", scope="static")],
)
def test_static_global_scale(format):
    x = data(330, 416)
    assert format.needs_static
    g = format.global_from_amax(x.abs().amax())
    identical(format.fake(x, global_scale=g), replace(format, scope="tensor").fake(x))
    identical(format.fake(x[:7], global_scale=g), format.fake(x, global_scale=g)[:7])
    identical(format.fake(x, global_scale=g), format.quantize(x, global_scale=g).dequantize())
    larger = format.fake(100 * x, global_scale=g)
    limit = x.abs().amax() * (1 if type(format) is NVFP4 else 1.75)
    assert larger.abs().max() <= limit * (1 + 1e-6)
    with pytest.raises(ConfigError, match="scope=static needs a calibrated global scale"):
        format.fake(x)


def test_a_shared_global_scale_is_that_of_the_largest():
    a, b = data(16, 64), 4 * data(16, 64, seed=1)
    format = NVFP4()
    shared = format.global_from_amax(torch.maximum(a.abs().amax(), b.abs().amax()))
    assert torch.equal(
        shared, torch.minimum(format.scales(a).global_scale, format.scales(b).global_scale)
    )
    together = format.fake(torch.cat([a, b]))
    identical(format.quantize(a, global_scale=shared).dequantize(), together[:16])


def test_fixed_decode_scale_has_its_range():
    format = NVFP4(global_scale="fixed")
    peaks = torch.tensor([2.0**-11, 1.0, 448.0, 1000.0])
    dq = format.fake(peaks[:, None].repeat(1, 16))[:, 0]
    assert dq[0] == 0
    torch.testing.assert_close(dq[1:3], peaks[1:3], rtol=0.07, atol=0)
    assert dq[3] == 448


# gradients and values that are not finite


@named("nvfp4", "int4", "mxfp4", "fouroversix")
def test_straight_through_gradient(format):
    x = data(8, 64).requires_grad_()
    y = format.fake(x, ste=True)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))
    torch.testing.assert_close(y.detach(), format.fake(x), rtol=1e-6, atol=1e-7)
    assert not format.fake(x).requires_grad


@named()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_must_be_finite(format, bad):
    x = data(4, 64)
    x[1, 3] = bad
    with pytest.raises(DataError, match="1 of 256"):
        replace(format, role="weight", **fitting(format, "weight")).quantize(x)


def fitting(format, role):
    names = {"weight": ("token", "channel"), "activation": ("channel", "token")}[role]
    knobs = {"granularity": names[1]} if format.granularity == names[0] else {}
    return {**knobs, "scope": "tensor"} if isinstance(format, NVFP4) and role == "weight" else knobs


@named()
def test_nan_activations_stay_visible(format):
    if format.granularity == "block":
        pytest.skip("squares are of weights")
    format = replace(format, role="activation", **fitting(format, "activation"))
    x = data(4, 64)
    x[1, 3] = torch.nan
    dq = format.fake(x)
    everything = format.granularity == "tensor" or getattr(format, "scope", "token") == "tensor"
    if getattr(format, "global_scale", "") in ("fixed", "none"):
        everything = False
    if getattr(format, "range", "") == "unit":
        assert torch.equal(dq.isnan(), x.isnan())
    elif everything:
        assert dq.isnan().all()
    elif getattr(format, "scope", "") == "token":
        assert torch.equal(
            dq.isnan(), torch.tensor([False, True, False, False])[:, None].expand(4, 64)
        )
    else:
        own = blocks_of(format, torch.zeros(4, 64)).clone()
        own[1, 0] = 1
        assert torch.equal(dq.isnan(), own.flatten(-2).bool())


@named("nvfp4", "mxfp4", "int4", "fp4")
def test_infinite_activations_are_not_hidden(format):
    x = data(4, 64)
    x[1, 3] = torch.inf
    dq = replace(format, role="activation", **fitting(format, "activation")).fake(x)
    assert not dq[1, :16].isfinite().all()


# casts and packing


@pytest.mark.parametrize("grid", [E2M1, E2M3, E3M2, E4M3, E5M2], ids=lambda g: g.name)
def test_grid_points_are_fixed_and_codes_unique(grid):
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    values = grid.decode(codes)
    codes, values = codes[~values.isnan()], values[~values.isnan()]
    assert values.max() == grid.max
    assert torch.equal(grid.round_(values.clone()), values)
    nonzero = values != 0
    assert torch.equal(grid.encode(values, values < 0)[nonzero], codes[nonzero])
    assert torch.equal(
        grid.round_(torch.tensor([1e30, -torch.inf])), torch.tensor([grid.max, -grid.max])
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_casts_are_those_of_torch(dtype):
    grid = E4M3 if dtype == torch.float8_e4m3fn else E5M2
    x = torch.exp2(torch.linspace(-20, 20, 4001)).clamp(max=grid.max)
    assert torch.equal(grid.round_(x.clone()), x.to(dtype).float())


def test_ties():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat([ties, -ties])
    rules = {
        "even": [0, 1, 1, 2, 2, 4, 4],
        "zero": [0, 0.5, 1, 1.5, 2, 3, 4],
        "away": [0.5, 1, 1.5, 2, 3, 4, 6],
    }
    for rule, want in rules.items():
        want = torch.tensor([float(v) for v in want])
        assert torch.equal(E2M1.round_(ties.clone(), rule), torch.cat([want, -want]))
    off = torch.cat([torch.nextafter(ties, 2 * ties), torch.nextafter(ties, 0 * ties)])
    for rule in ("zero", "away"):
        assert torch.equal(E2M1.round_(off.clone(), rule), E2M1.round_(off.clone()))


def test_sign_of_zero_lives_in_the_codes():
    x = torch.tensor([[6.0, -0.0, -0.01, 0.01] + [0.0] * 28])
    q = MX().quantize(x)
    assert q.codes[0, :4].tolist() == [7, 0, 8, 0]
    assert not q.dequantize().signbit().any()


def test_packing_is_invertible():
    g = torch.Generator().manual_seed(0)
    for n in (1, 7, 8, 33):
        codes = torch.randint(0, 16, (3, n), generator=g, dtype=torch.uint8)
        assert torch.equal(unpack_nibbles(pack_nibbles(codes), n), codes)
        signed = codes.to(torch.int8) - 8
        assert torch.equal(unpack_nibbles(pack_nibbles(signed), n, signed=True), signed)
    assert pack_nibbles(torch.tensor([[1, 2]], dtype=torch.uint8)).item() == 0x21


# MX scales


def test_mx_scale_rules():
    g = torch.Generator().manual_seed(0)
    peaks = torch.exp2(torch.rand(4000, generator=g, dtype=torch.float64) * 250 - 130).float()
    powers = 6 * torch.exp2(torch.arange(-140.0, 120.0))
    peaks = torch.cat(
        [peaks, powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, powers * 0)]
    )
    peaks = peaks[peaks > 0]
    x = torch.zeros(len(peaks), 32)
    x[:, 5] = peaks

    def scale(rule):
        format = MX(mx_scale=rule)
        return format.scales(x).scale[:, 0].int(), format.lattice(format.scales(x))[0][
            :, 0
        ].double()

    k, s = scale("rceil")
    assert (s * 6 * (1 + 2**-23) >= peaks.double()).all()
    assert ((s * 3 < peaks.double()) | (k == 0)).all()
    k, s = scale("floor")
    assert ((s * 4 <= peaks.double()) | (k == 0)).all()
    assert (s * 8 > peaks.double()).all()
    k, s = scale("ceil")
    assert (s * 4 >= peaks.double()).all()
    k, s = scale("even")
    assert (s * 7 > peaks.double()).all()
    assert ((s * 3.5 <= peaks.double()) | (k == 0)).all()


# refusals


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


# schemes


def test_cache_groups():
    x = data(2, 3, 5, 16).contiguous()  # batch, heads, tokens, head_dim
    per_head = KVCache().fake(x, "key")
    identical(per_head[1, 2, 4], KVCache().part("key").fake(x[1, 2, 4]))
    together = KVCache(group_size=-1).fake(x, "value")
    identical(together[1, :, 4].reshape(-1), KVCache().part("value").fake(x[1, :, 4].reshape(-1)))
    halves = KVCache(group_size=8, clip_v=0.8)
    assert halves.part("value").clip == 0.8
    assert halves.part("key").clip == 0.95
    halves.check(16, "format.kv.group_size", "head_dim")
    with pytest.raises(ConfigError, match=r"kv\.group_size=8"):
        halves.check(12, "format.kv.group_size", "head_dim")


def test_overrides_replace_one_part():
    eight = Integer(bits=8, granularity="token", role="activation")
    overrides = {(1, "mlp.down_proj"): {"act": eight}, (0, "mlp.up_proj"): {"weight": None}}
    scheme = Scheme("w4a4", FORMATS["nvfp4"], FORMATS["nvfp4_token"], overrides=overrides)
    assert scheme.part("act", 1, "mlp.down_proj") is eight
    assert scheme.part("act", 0, "mlp.down_proj") is scheme.act
    assert scheme.part("weight", 1, "mlp.down_proj") is scheme.weight
    assert scheme.weights(0, ["mlp.up_proj", "mlp.down_proj"]) == {"mlp.down_proj": scheme.weight}
    assert scheme.part("weight", None, "lm_head") is None, (
        "the head is quantized by an override only"
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_range_is_the_calibrated_one(symmetric):
    """Values quantized on the grid of the range seen, whatever they are themselves; beyond it they
    are clamped."""
    static = Integer(
        bits=8, granularity="tensor", symmetric=symmetric, role="activation", range="static"
    )
    seen = data(64, 48)
    g = static.calibrated(*torch.aminmax(seen))
    assert g.tolist() == [seen.min(), seen.max()]
    assert torch.equal(static.fake(seen, global_scale=g), static.dynamic().fake(seen))
    half = static.fake(seen / 2, global_scale=g)
    assert not torch.equal(half, static.dynamic().fake(seen / 2))
    step = seen.abs().max() / 127 if symmetric else (seen.max() - seen.min()) / 255
    assert (half - seen / 2).abs().max() <= step / 2 * 1.001
    assert static.fake(seen * 9, global_scale=g).abs().max() <= seen.abs().max() + step
    with pytest.raises(ConfigError, match="range=static needs a calibrated range"):
        static.fake(seen)
    with pytest.raises(ConfigError, match="range=dynamic"):
        Integer(range="static")
