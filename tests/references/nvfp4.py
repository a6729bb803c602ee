"""NVFP4, Four Over Six and IF4: exact, or up to ties where a reference works in another order of
arithmetic."""

import torch
from references.agreement import check_format, exactly, nearly

from harness.formats import IF4, NVFP4, FourOverSix, Scales, absmax


def compressed_tensors_nvfp4(x, golden, math):
    check_format(
        NVFP4(compute_dtype="float32" if math else "input"), x.to(golden["dq"].dtype), golden
    )


def fouroversix(x, golden, choose):
    format = FourOverSix(choose=choose)
    exactly(format.scales(x.float()).global_scale, golden.pop("amax"), "amax")
    check_format(format, x.float(), golden)


def if4(x, golden, choose):
    """Exact, the choice too, but under E4M3-subnormal scales: they let a quotient pass 6, which the
    reference does not clamp, so that FP4 reaches 8 there."""
    format = IF4(choose=choose)
    q = format.quantize(x.float())
    exactly(q.scales.global_scale, golden["amax"], "amax")
    ours, theirs = q.scales.scale.view(torch.uint8), golden["scale"]
    exactly(ours & 0x7F, theirs & 0x7F, "scale")
    held = (theirs & 0x7F == 0) | (theirs & 0x7F >= 0x08)
    exactly(ours[held], theirs[held], "choice")
    held = held.repeat_interleave(16, dim=-1)
    exactly(q.dequantize()[held], golden["dq"][held], "dq")
    exactly(format.fake(x.float()), q.dequantize(), "fake")


def same_scales(ours, theirs, floors):
    """Equal E4M3 bytes, except where a reference lifts a scale to one of its floors that we keep or
    flush."""
    ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    flushed = NVFP4().scales(torch.zeros(1, 16)).scale.view(torch.uint8)
    lifted = sum(
        (theirs == floor) & ((ours < floor) | (ours == flushed)) for floor in floors
    ).bool()
    exactly(ours[~lifted], theirs[~lifted], "scale")


def nvfp4_nearly(x, golden, reference):
    """torchao never goes below 2^-6, modelopt below 2^-9 (with 1 for zero blocks); fouroversix
    keeps scales of zero, maps block maxima to 4 in static_4, and does not clamp: where a subnormal
    scale lets x reach 7, its 8 wraps to zero in four bits."""
    format = NVFP4(global_scale="none") if reference == "torchao_single_level" else NVFP4()
    ours = format.quantize(x.float())
    g = ours.scales.global_scale
    same_scales(
        ours.scales.scale,
        golden["scale"],
        {"t": (0x08,), "m": (0x01, 0x38), "f": (0x00,)}[reference[0]],
    )
    if "global_scale" in golden:
        torch.testing.assert_close(golden["global_scale"] * g, torch.ones(1), rtol=1e-6, atol=0)
    if "amax" in golden:
        exactly(absmax(x.float().flatten()), golden["amax"], "amax")
    theirs = Scales(
        golden["scale"].view(torch.float8_e4m3fn),
        None,
        g * 4 / 6 if reference == "fouroversix_static_4" else g,
    )
    got = format.quantize(x.float(), theirs).dequantize()
    if reference == "fouroversix_static_6":
        eff = (
            format.lattice(theirs)[0]
            .masked_fill(golden["scale"] >= 0x08, torch.inf)
            .repeat_interleave(16, dim=-1)
        )
        got = got.masked_fill(x.float().abs() >= 7 * eff, 0.0)
    nearly(x, got, golden["dq"], "dq", unlimited=reference == "fouroversix_static_4")
