"""SmoothQuant leaves the logits alone, beside rotations too, and its scales are those of the
channels' maxima."""

import pytest
import torch
from prepared import (
    ALL,
    WINDOWS,
    every_family,
    every_model,
    layer_part,
    moved,
    prepared,
    put,
    subject_of,
)
from preserved import logits, shape_of

from harness.models.merge import fuse_norms
from harness.transforms.quarot import QuaRot
from harness.transforms.smoothquant import NORM_SITES, PRODUCT_SITES, SmoothQuant


@every_model
@pytest.mark.parametrize(
    "sites", [NORM_SITES, PRODUCT_SITES, None], ids=["norms", "products", "all"]
)
def test_smoothquant_keeps_logits(family, tie, sites):
    adapter, before = prepared(family, tie, fuse=False)
    kept = {name: layer_part(adapter, f"mlp.{name}_proj").weight.clone() for name in ("gate", "up")}
    o = layer_part(adapter, "self_attn.o_proj").weight.clone()
    put(adapter, SmoothQuant(0.85, sites))
    assert moved(adapter, before) < 1e-10
    if sites == PRODUCT_SITES:
        assert torch.equal(layer_part(adapter, "mlp.gate_proj").weight, kept["gate"])
        assert not torch.equal(layer_part(adapter, "mlp.up_proj").weight, kept["up"])
        scale = (layer_part(adapter, "self_attn.o_proj").weight / o).unflatten(1, (2, 3, -1))
        torch.testing.assert_close(scale, scale[:1, :, :1].expand_as(scale), rtol=1e-12, atol=0)
        assert float(scale[0, 0, 0].std()) > 0 and not torch.allclose(
            scale[0, 0, 0], scale[0, 1, 0]
        )


@every_family
def test_smoothing_scales_are_those_of_the_channel_maxima(family):
    adapter, _ = prepared(family)
    subject, context = subject_of(adapter), shape_of(adapter)
    found = SmoothQuant(0.3, PRODUCT_SITES).fit(context, subject).merged
    for site, linear in zip(PRODUCT_SITES, ("self_attn.o_proj", "mlp.down_proj")):
        weight, rows = layer_part(adapter, linear).weight, []
        handle = layer_part(adapter, linear).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0])
        )
        logits(adapter, WINDOWS)
        handle.remove()
        x, w = rows[0].flatten(0, 1).abs().amax(0), weight.abs().amax(0)
        if site == "o_in":
            x, w = (t.unflatten(0, (2, 3, -1)).amax(1).flatten() for t in (x, w))
        torch.testing.assert_close(found[0, site].scale, x**0.3 / w**0.7, rtol=1e-5, atol=0)


@every_model
def test_smoothing_stacks_with_rotations_on_either_side(family, tie):
    for steps in (
        [SmoothQuant(0.5, PRODUCT_SITES), QuaRot(**ALL)],
        [QuaRot(**ALL), SmoothQuant(0.5, NORM_SITES)],
    ):
        adapter, before = prepared(family, tie)
        weight = layer_part(adapter, "mlp.down_proj").weight
        for step in steps:
            kept = weight.clone()
            put(adapter, step)
            assert moved(adapter, before) < 1e-10
        assert torch.equal(kept, weight) == isinstance(steps[-1], SmoothQuant)


@every_family
def test_smoothing_norm_sites_before_norm_fusion_does_nothing(family):
    plain, _ = prepared(family)
    smooth, _ = prepared(family, fuse=False)
    norm = layer_part(smooth, "input_layernorm").weight.clone()
    put(smooth, SmoothQuant(0.5, NORM_SITES))
    assert not torch.allclose(norm, layer_part(smooth, "input_layernorm").weight)
    fuse_norms(smooth)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(smooth.model.state_dict()[name], tensor, rtol=1e-12, atol=0)
