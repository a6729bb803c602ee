"""Codecs merged into weights: they leave the logits alone where they meet, and live equals
merged."""

import pytest
import torch
from prepared import (
    ALL,
    CODECS,
    IDS,
    codec_matrices,
    codec_placement,
    every_family,
    moved,
    normal,
    orthogonal,
    prepared,
)
from preserved import exact_model, logits, shape_of
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from harness.codecs.fold import fold
from harness.formats import NVFP4, Integer, KVCache, Scheme
from harness.models.attention import attach
from harness.models.merge import fuse_norms, place, swap
from harness.models.quant_linear import SiteInput
from harness.models.unmerged import unmerged
from harness.transforms import Blocks, Diagonal, Placement
from harness.transforms.quarot import QuaRot

INT8 = Integer(bits=8, granularity="token", role="activation")


@every_family
def test_codecs_chained_at_one_site_keep_logits(family):
    """A rotated residual stream, a merged codec and an online one, which do not commute, at each
    site."""
    adapter, before = prepared(family)
    context = shape_of(adapter)
    scales = {
        (None, site): Diagonal(normal(n).exp())
        for site, n in context.widths.items()
        if site != "o_in"
    }
    values = {
        (None, "o_in"): Blocks(orthogonal(context.kv_heads, context.head_dim, context.head_dim))
    }
    online = {(None, site): Blocks(orthogonal(n, n, seed=1)) for site, n in context.widths.items()}
    place(
        adapter,
        Placement(
            Blocks(orthogonal(context.hidden, context.hidden, seed=2)), {**scales, **values}, online
        ),
    )
    assert moved(adapter, before) < 1e-10


@every_family
@pytest.mark.parametrize(
    "act", [INT8, NVFP4(scope="token", role="activation")], ids=["int8", "nvfp4"]
)
@pytest.mark.parametrize("case", ["quarot", *CODECS], ids=str)
def test_live_equals_merged_with_quantizers_on(family, act, case):
    adapter, before = prepared(family)
    if case == "quarot":
        scheme = Scheme(act=act, kv=KVCache(bits=8))
        placement = QuaRot(**{**ALL, "r1": "random"}).fit(shape_of(adapter, scheme), None)
    else:
        scheme, seeds = Scheme(act=act), iter(range(99))
        matrices = codec_matrices(
            adapter,
            *case,
            lambda m: {n: orthogonal(*e.shape, seed=next(seeds)) for n, e in m.items()},
        )
        placement = codec_placement(adapter, case[0], matrices)
    with unmerged(adapter, placement, scheme):
        wanted = logits(adapter, IDS)
    with unmerged(adapter, placement):
        unquantized = logits(adapter, IDS)
    assert moved(adapter, before) < 1e-10
    place(adapter, placement)
    assert moved(adapter, unquantized) < 1e-10
    assert (moved(adapter, before) > 0.1) == (case[1] == "free")
    for module in adapter.model.modules():
        if isinstance(module, SiteInput):
            module.format = scheme.act.dynamic()
    for heads in attach(adapter):
        heads.format = scheme.kv
    assert moved(adapter, unquantized) > 1e-3
    assert moved(adapter, wanted) < 1e-8


@every_family
def test_the_gradient_through_fold_is_that_of_the_live_forward(family):
    """At matrices that are not orthogonal, where the loss does depend on them in every
    direction."""
    adapter = exact_model(family)
    fuse_norms(adapter)
    context = shape_of(adapter)
    shapes = [(context.hidden,) * 2, (context.layers, context.kv_heads, *(context.head_dim,) * 2)]
    leaves = [
        (orthogonal(*shape) + 0.02 * normal(*shape, seed=1)).requires_grad_() for shape in shapes
    ]

    def gradients(run):
        r1, r2 = leaves
        found = run(
            Placement(
                residual=Blocks(r1), merged={(i, "o_in"): Blocks(m) for i, m in enumerate(r2)}
            )
        )
        loss = cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def folded(placement):
        weights = fold(
            {n: p.detach() for n, p in adapter.model.named_parameters()}, placement, adapter.roles
        )
        return functional_call(
            adapter.model, weights, kwargs={"input_ids": IDS, "use_cache": False}
        ).logits

    def lived(placement):
        with unmerged(adapter, placement):
            return adapter.model(input_ids=IDS, use_cache=False).logits

    wanted = gradients(folded)
    swap(adapter)
    for a, b in zip(gradients(lived), wanted):
        assert float(b.norm()) > 1e-3
        assert float((a - b).norm() / b.norm()) < 1e-8
