"""What every number format does on data of several dtypes and shapes: four maps of one lattice,
which agree in every bit."""

from dataclasses import replace

import pytest
import torch
from number_formats import FORMATS, data, extremes, identical, named

from harness.formats import FP4, FP8, MSE, NVFP4, FourOverSix, Integer, QTensor

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


@pytest.mark.parametrize("format", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_text_is_read_without_its_neighbours_unless_a_scale_spans_tokens(format):
    text, other = data(1, 1, 96), 40 * data(1, 9, 96, seed=1)
    seen = format.calibrated(*torch.aminmax(text)) if format.needs_static else None
    alone = format.fake(text, global_scale=seen)
    beside = format.fake(torch.cat([text, other], 1), global_scale=seen)[:, :1]
    assert torch.equal(alone, beside) != format.spans_tokens


@named()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (7, 64), (3, 5, 160), (1, 32), (330, 416)])
def test_fake_is_quantize_then_dequantize(format, dtype, shape):
    x = data(*shape, dtype=dtype)
    x.view(-1)[:: max(7, x.shape[-1] // 3)] = -0.0
    identical(format.fake(x), format.quantize(x).dequantize())


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


@named("nvfp4", "int4", "mxfp4", "fouroversix")
def test_straight_through_gradient(format):
    x = data(8, 64).requires_grad_()
    y = format.fake(x, ste=True)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))
    torch.testing.assert_close(y.detach(), format.fake(x), rtol=1e-6, atol=1e-7)
    assert not format.fake(x).requires_grad
