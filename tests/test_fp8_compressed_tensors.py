"""FP8 against compressed-tensors, in every bit: weights, activations, static scales."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from number_formats import DTYPES, FP8_WEIGHTS, data, extremes

from harness.checkpoints import layouts
from harness.config.errors import ConfigError
from harness.formats import FP8

ACTIVATIONS = {
    "tensor": FP8(granularity="tensor", role="activation"),
    "token": FP8(granularity="token", role="activation"),
    "group": FP8(granularity="group", group_size=32, role="activation"),
}


def args_of(format: FP8) -> QuantizationArgs:
    return QuantizationArgs(**layouts.described(format))


def observed(format: FP8, w: torch.Tensor, args: QuantizationArgs):
    """compressed-tensors' scales of a weight: least and greatest value of each group, written out
    here with loops, given to its own rule."""
    m, n = w.shape
    b = format.group_size
    height, width = {
        "tensor": (m, n),
        "channel": (1, n),
        "group": (1, b),
        "block": (b, b),
    }[format.granularity]
    squares = [
        [w[i : i + height, j : j + width] for j in range(0, n, width)] for i in range(0, m, height)
    ]
    low, high = (
        torch.stack([torch.stack([pick(square) for square in row]) for row in squares])
        for pick in (torch.amin, torch.amax)
    )
    if format.granularity == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    return calculate_qparams(low, high, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", FP8_WEIGHTS)
def test_weights_are_compressed_tensors(granularity, dtype):
    format = replace(FP8_WEIGHTS[granularity], compute_dtype="input", scale_dtype="input")
    args = args_of(format)
    # 7 rows and 32 columns are left of the squares
    for w in (data(71, 160, dtype=dtype), *extremes(dtype).values()):
        scale, zero = observed(format, w, args)
        q = format.quantize(w)
        assert torch.equal(q.scales.scale.reshape(scale.shape), scale)
        codes = quantize(w, scale, zero, args, dtype=torch.float8_e4m3fn)
        some = codes.float() != 0  # the sign of a zero is lost there where a quotient underflows
        assert torch.equal(q.codes[some], codes.view(torch.uint8)[some])
        assert (q.codes[~some] & 0x7F == 0).all()
        served = fake_quantize(w, scale, zero, args)
        assert torch.equal(q.dequantize(), served)
        assert torch.equal(format.fake(w), served)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ACTIVATIONS)
def test_activations_are_compressed_tensors(granularity, dtype):
    format = replace(ACTIVATIONS[granularity], compute_dtype="input", scale_dtype="input")
    args = args_of(format)
    for x in (data(2, 9, 160, dtype=dtype), *(x[None] for x in extremes(dtype).values())):
        served = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args)
        assert torch.equal(format.fake(x), served.view(x.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_static_scale_is_compressed_tensors(dtype):
    format = FP8(granularity="tensor", range="static", role="activation", compute_dtype="input")
    args = args_of(format)
    seen = data(4, 9, 160, dtype=dtype)
    amax = format.calibrated(*torch.aminmax(seen))
    scale, zero = calculate_qparams(*(end.reshape(1) for end in torch.aminmax(seen)), args)
    for x in (seen, 5 * data(3, 160, dtype=dtype, seed=1), seen[:1] / 100):
        assert torch.equal(format.fake(x, global_scale=amax), fake_quantize(x, scale, zero, args))
    with pytest.raises(ConfigError, match="range=static needs a calibrated range"):
        format.fake(seen)
    assert format.dynamic() == replace(format, range="dynamic")
