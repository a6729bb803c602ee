"""Activations, keys and values are evaluated as compressed-tensors computes them at run time, in
every bit."""

import pytest
import torch
from composed import composed
from compressed import CACHED, STATIC
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from harness.checkpoints import entries, layouts
from harness.config.build import build, settings
from harness.formats import Format, KVCache


def activations(dtype: torch.dtype) -> torch.Tensor:
    """[2, 96, 64]: tokens of both signs, of one, all zero, tiny, with an outlier, and on the ties
    of 8-bit codes."""
    x = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(5))
    x[:, 8:16].abs_()
    x[:, 16:24].abs_().neg_()
    x[:, 24] = 0
    x[:, 25:32] *= 1e-4
    x[:, 32:40, 7] *= 500
    x[:, 40:48] = torch.arange(64) / 2 - 16
    x[:, 40:48, 63] = 255 - 16
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "chosen",
    [
        ["format=int8"],
        ["format=int4"],
        ["format=w4a4kv4"],
        ["format=int8", "format.act.granularity=tensor"],
        ["format=int8", "format.act.granularity=group", "format.act.group_size=32"],
        ["format=int8", "format.act.symmetric=true", "format.act.int_scale=half_range"],
        ["format=nvfp4"],
        ["format=fp8"],
        ["format=w4a8_fp8"],
        ["format=fp8", "format.act.granularity=tensor"],
        ["format=fp8_block", "format.act.group_size=32"],
        ["format=mxfp4", "format.act.mx_scale=even"],
        ["format=mxfp6", "format.act.mx_scale=even"],
        ["format=mxfp8", "format.act.mx_scale=even", "format.act.mx_even_mbits=1"],
    ],
    ids=str,
)
def test_activations_are_evaluated_as_they_are_served(chosen, dtype):
    """What compressed-tensors computes at run time from what config.json says, in every bit."""
    cfg, _ = composed("export=compressed_tensors", *chosen)
    act = build(settings(cfg)["format"]["act"], "format.act", Format)
    layouts.refuse(act, "format.act")
    if entries.served(dtype, [act]) != dtype and dtype != torch.float32:
        pytest.skip("no model of this format is served in float16")
    x, args = activations(dtype), QuantizationArgs(**layouts.described(act))
    g = act.calibrated(*torch.aminmax(x)) if act.needs_static else None
    served = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None, g), args, g)
    assert served.dtype == dtype
    assert torch.equal(act.fake(x, global_scale=g), served.view(x.shape))


@pytest.mark.skipif(not CACHED, reason="the installed releases quantize no cache")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "chosen",
    [
        ["format=w4a4kv4"],
        ["format=w4a4kv4", "format.kv.group_size=16"],
        ["format=fp8_kv"],
        ["format=fp8_kv", "format.kv.group_size=16"],
        ["format=fp8_kv", "format.kv.scale=unit"],
        ["format=mxfp4_kv"],
    ],
    ids=str,
)
def test_keys_and_values_are_evaluated_as_they_are_served(chosen, dtype):
    cfg, _ = composed(
        "export=compressed_tensors", "format.kv.clip_k=1.0", "format.kv.clip_v=1.0", *chosen
    )
    kv = build(settings(cfg)["format"]["kv"], "format.kv", KVCache)
    x, args = (
        activations(dtype).view(2, 96, 2, 32).transpose(1, 2),
        QuantizationArgs(**layouts.cache_scheme(kv, 32)),
    )
    if args.dynamic:
        scales = compute_dynamic_scales_and_zp(x, args, None)
    else:
        scales = entries.cache_entries(kv)["k_scale"].to(dtype), None
    assert torch.equal(kv.fake(x, "key"), fake_quantize(x, *scales, args))


def test_a_static_scale_is_that_of_the_evaluation():
    """Computed in the activations' dtype from the range seen, and stored; transformers reads it in
    the dtype it computes in."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = activations(dtype)
        seen = STATIC.calibrated(*torch.aminmax(x))
        stored = entries.input_entries(STATIC, seen, dtype)
        args = QuantizationArgs(**layouts.described(STATIC))
        served = fake_quantize(x, stored["input_scale"].to(dtype), stored["input_zero_point"], args)
        assert torch.equal(STATIC.fake(x, global_scale=seen), served)
