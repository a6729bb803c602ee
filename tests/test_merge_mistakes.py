"""Mistakes of merging that must be seen in the logits."""

import pytest
import torch
from prepared import (
    OFF,
    every_family,
    every_model,
    layer_part,
    moved,
    orthogonal,
    part,
    prepared,
    put,
)
from preserved import shape_of

from harness.linalg.hadamard import hadamard
from harness.models.merge import place
from harness.transforms import Blocks, Placement, merge
from harness.transforms.quarot import QuaRot


@pytest.mark.parametrize("mistake", ["fused", "rotated"])
@every_family
def test_one_tensor_for_head_and_embedding_breaks_the_model(family, mistake):
    """Fused: the final norm's weight reaches the embedding. Rotated: what is shared turns once for
    each of its roles."""
    adapter, before = prepared(family)
    embedding = part(adapter, adapter.structure.embedding)
    if mistake == "fused":
        embedding.weight = adapter.head.weight
    else:
        placement = put(adapter, QuaRot(**{**OFF, "r1": "random"}))
        head = merge(embedding.weight.data, placement, adapter.roles[adapter.structure.head])
        adapter.head.weight.data, embedding.weight.data = head, head
    assert moved(adapter, before) > 0.1


@every_model
def test_a_rotation_without_norm_fusion_breaks_the_model(family, tie):
    adapter, before = prepared(family, tie, fuse=False)
    put(adapter, QuaRot(**{**OFF, "r1": "random"}))
    assert moved(adapter, before) > 0.1


@every_family
def test_absorbing_the_transpose_is_seen_with_a_paley_matrix_only(family):
    """A decoder R in place of R^T absorbs as W R^T; a symmetric Sylvester matrix hides that, so R
    must not be symmetric."""
    found = {}
    for n in (12, 64):
        adapter, before = prepared(family)
        place(adapter, Placement(residual=Blocks(hadamard(n), decoder=hadamard(n))))
        found[n] = moved(adapter, before)
    assert found[12] > 0.1
    assert found[64] < 1e-10
    assert torch.equal(hadamard(64), hadamard(64).T) and not torch.equal(
        hadamard(12), hadamard(12).T
    )


def test_forgetting_the_bias_of_v_breaks_the_model():
    adapter, before = prepared("qwen2")
    kept = [layer_part(adapter, "self_attn.v_proj", i).bias.clone() for i in range(2)]
    put(adapter, QuaRot(**{**OFF, "r2": True}))
    assert moved(adapter, before) < 1e-10
    for i, bias in enumerate(kept):
        layer_part(adapter, "self_attn.v_proj", i).bias.copy_(bias)
    assert moved(adapter, before) > 0.1


@every_family
def test_heads_tiled_instead_of_repeated_break_the_model(family):
    """A matrix of its own for each key/value head: query head j needs that of j // 3, not of j %
    2."""
    adapter, before = prepared(family)
    context = shape_of(adapter)
    matrices = orthogonal(context.kv_heads, context.head_dim, context.head_dim)
    kept = [layer_part(adapter, "self_attn.o_proj", i).weight.clone() for i in range(2)]
    place(adapter, Placement(merged={(None, "o_in"): Blocks(matrices)}))
    assert moved(adapter, before) < 1e-10
    for order, breaks in ((torch.arange(6) // 3, False), (torch.arange(6) % 2, True)):
        for i, weight in enumerate(kept):
            heads = torch.einsum("ohd,hde->ohe", weight.unflatten(1, (6, -1)), matrices[order])
            layer_part(adapter, "self_attn.o_proj", i).weight.copy_(heads.flatten(1))
        assert (moved(adapter, before) > 0.1) == breaks


@every_family
def test_subtracting_the_embedding_mean_changes_the_model(family):
    adapter, before = prepared(family)
    table = part(adapter, adapter.structure.embedding).weight.data
    table -= table.mean(-1, keepdim=True)
    assert moved(adapter, before) > 0.1
