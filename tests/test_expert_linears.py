"""Routed experts as linears of their own: the same logits, and tokens for each to be calibrated
on."""

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from harness.calibration import passage
from harness.calibration.stream import ENOUGH, Stream
from harness.models.adapter import Adapter
from harness.models.experts import entering, leaving
from harness.models.merge import swap

ROUTED = ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"]


def experts_of(adapter: Adapter, layer: int) -> nn.Module:
    """The module that runs a block's experts, once they are swapped."""
    site = next(site for site in adapter.sites(layer) if site.expert == 0)
    return adapter.blocks[layer].get_submodule(passage.leaf(site))


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTED)
def test_experts_as_linears_of_their_own_change_no_logit(name):
    model = zoo.make(name)
    ids = zoo.token_ids(2, 96)
    before = model(ids, use_cache=False).logits
    adapter = Adapter(model)
    swap(adapter)
    after = model(ids, use_cache=False).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    last = adapter.structure.layers - 1
    module = experts_of(adapter, last)
    for linears in (entering(module), leaving(module)):
        assert len(linears) == 4
        # what the forward computes with: the module is not asked for weights of another place
        kept = linears[0].weight.clone()
        linears[0].weight.zero_()
        assert (model(ids, use_cache=False).logits - after).abs().max() > 1e-3
        linears[0].weight.copy_(kept)
    assert torch.equal(model(ids, use_cache=False).logits, after)


@torch.no_grad()
def test_biases_of_experts_are_computed_with():
    model = zoo.make("gpt_oss")
    ids = zoo.token_ids(2, 96)
    adapter = Adapter(model)
    swap(adapter)
    before = model(ids, use_cache=False).logits
    module = experts_of(adapter, 0)
    for linears in (entering(module), leaving(module)):
        kept = linears[1].bias.clone()
        linears[1].bias.add_(1)
        assert (model(ids, use_cache=False).logits - before).abs().max() > 1e-3
        linears[1].bias.copy_(kept)


@torch.no_grad()
def test_an_expert_that_got_few_tokens_is_calibrated_on_all():
    """One that got enough sees its own, in their order, whatever the micro-batches are."""
    adapter = Adapter(zoo.make("mixtral"))
    swap(adapter)
    block = adapter.blocks[0]
    module = experts_of(adapter, 0)
    ids = zoo.token_ids(4, 64)
    calls = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    adapter.model(ids, use_cache=False)
    handle.remove()
    hidden, index, _ = calls[0]
    given = [int((index == expert).sum()) for expert in range(4)]
    assert min(given) < ENOUGH <= max(given), "tokens for both cases"

    seen = {}
    for site, rows in Stream(adapter, ids, tokens_at_once=64).walk(block):
        if site.expert is not None:
            seen[site.name] = torch.cat([each.flatten(0, -2) for each in rows])
    for expert, tokens in enumerate(given):
        own = hidden[(index == expert).any(-1)]
        x = hidden if tokens < ENOUGH else own
        torch.testing.assert_close(seen[f"experts_in.{expert}"], x)
        gate, up = (x @ entering(module)[expert].weight.T).chunk(2, dim=-1)
        torch.testing.assert_close(seen[f"experts_down_in.{expert}"], F.silu(gate) * up)
