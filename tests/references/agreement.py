"""How a format agrees with a golden vector: in every bit, or up to ties and the last bit of
float32."""

import torch

from harness.formats import Scales, error


def exactly(got, want, what):
    """Equal shapes and values; NaN equals NaN."""
    got, want = got.double(), want.double().reshape(got.shape)
    wrong = (got != want) & ~(got.isnan() & want.isnan())
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, "
        f"first {got[wrong][:3]} != {want[wrong][:3]}"
    )


def nearly(x, got, want, what, unlimited=False):
    """Equal up to the last float32 bit; or x, of bf16 data, lies halfway between the two (0.12 % of
    the elements)."""
    off = (got - want).abs() > 1e-6 * torch.maximum(got.abs(), want.abs())
    tie = ((x.float() - got).abs() - (want - x.float()).abs()).abs() <= 1e-5 * x.float().abs()
    assert not (off & ~tie).any(), (
        f"{what}: {int((off & ~tie).sum())} of {off.numel()} differ and are no ties"
    )
    allowed = (
        0
        if x.dtype == torch.float32
        else off.numel()
        if unlimited
        else max(2, 0.0012 * off.numel())
    )
    assert off.sum() <= allowed, (
        f"{what}: {int(off.sum())} of {off.numel()} ties fall the other way"
    )


def blockwise(x, group):
    return x.reshape(*x.shape[:-1], -1, group)


def check_format(format, x, golden):
    """Scales, zero points and global scale, then dq through codes and through the fast path."""
    q = format.quantize(x)
    if "scale" in golden:
        raw = golden["scale"].dtype == torch.uint8
        scale = (
            q.scales.scale.view(torch.uint8)
            if raw
            else format.lattice(q.scales, golden["scale"].dtype)[0]
        )
        exactly(scale, golden["scale"], "scale")
    if "zero_point" in golden and q.scales.zero is not None:
        exactly(q.scales.zero, golden["zero_point"], "zero point")
    if "global_scale" in golden:
        exactly(q.scales.global_scale, golden["global_scale"], "global scale")
    exactly(q.dequantize(), golden["dq"], "dq")
    exactly(format.fake(x), golden["dq"], "fake")


def check_searched(format, x, golden):
    """As check_format, but a group may have taken another candidate of equal error."""
    q = format.quantize(x)
    scale = format.lattice(q.scales, x.dtype)[0]
    other = ((scale != golden["scale"]) & ~(scale.isnan() & golden["scale"].isnan())).unsqueeze(-1)
    theirs = format.quantize(
        x, Scales(golden["scale"], golden["zero_point"].float() if "zero_point" in golden else None)
    )
    group = x.shape[-1] // scale.shape[-1]
    blocks, ours, dq = (
        blockwise(t.float(), group) for t in (x, q.dequantize(), theirs.dequantize())
    )
    e, e_theirs = error(blocks, ours, format.mse.norm), error(blocks, dq, format.mse.norm)
    torch.testing.assert_close(
        e.masked_fill(~other[..., 0], 0), e_theirs.masked_fill(~other[..., 0], 0), rtol=1e-6, atol=0
    )
    want = blockwise(golden["dq"], group)
    exactly(
        torch.where(other, want, blockwise(format.fake(x, ste=golden.get("ste", False)), group)),
        want,
        "fake",
    )
