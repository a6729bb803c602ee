"""The tape of a recorded forward gives what the block gives, in every bit, for other tokens too."""

import pytest
import torch
import zoo
from torch import nn

from harness.calibration.passage import leaf
from harness.calibration.recording import recorded
from harness.calibration.stream import Stream, arriving
from harness.models.adapter import Adapter
from harness.models.tiny import Tiny
from harness.structure.tape import tensors_of


def blocks_with_arguments(name: str, tokens: torch.Tensor):
    """(block, its sites, hidden states, what it is called with besides) of each block."""
    adapter = Adapter(zoo.make(name))
    hidden, contexts = arriving(adapter, tokens)
    for layer, context in enumerate(contexts):
        yield adapter.blocks[layer], adapter.sites(layer), hidden, context


def experts_of(block: nn.Module, sites) -> list[nn.Module]:
    """The modules that run experts: what they do depends on the router."""
    return [block.get_submodule(leaf(site)) for site in sites if site.expert == 0]


TAPED = [
    "qwen3", "gemma3_text", "gpt2", "falcon", "bloom", "mixtral", "gpt_oss", "deepseek_v3",
    "qwen3_next", "nemotron_h", "mamba",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", TAPED)
def test_a_tape_gives_what_the_block_gives_for_other_tokens(name):
    """Call by call, and in the end nothing is held but the output."""
    first, second = (list(blocks_with_arguments(name, zoo.token_ids(seed=seed))) for seed in (0, 1))
    for (block, sites, hidden, context), (_, _, others, other_context) in zip(first, second):
        tape = recorded(block, hidden, context, experts_of(block, sites))
        assert not tape.reads_content
        assert not torch.equal(hidden, others)
        values = dict(zip(tape.given, tensors_of((others, other_context))))
        for position in range(len(tape.calls)):
            tape.run(values, position, position + 1)
        expected = tensors_of(block(others, **other_context))[0]
        assert torch.equal(values[tape.output[0]], expected)
        assert {value for value in values if value.call is not None} == set(tape.output)


@torch.no_grad()
def test_a_leaf_may_change_after_it_was_recorded():
    block, _, hidden, context = next(blocks_with_arguments("llama", zoo.token_ids()))
    tape = recorded(block, hidden, context, [block.mlp.down_proj])
    assert [call.function for call in tape.calls if call.op == "leaf"] == [block.mlp.down_proj]
    before = tensors_of(block(hidden, **context))[0]
    block.mlp.down_proj.weight = nn.Parameter(-block.mlp.down_proj.weight)
    after = tensors_of(block(hidden, **context))[0]
    values = dict(zip(tape.given, tensors_of((hidden, context))))
    tape.run(values, 0, len(tape.calls))
    assert torch.equal(values[tape.output[0]], after)
    assert not torch.equal(before, after)


class Choosing(nn.Module):
    """Computes something else where the first token's first feature is negative."""

    def __init__(self, inner: nn.Module, asks: bool):
        super().__init__()
        self.inner = inner
        self.asks = asks
        self.went: set[bool] = set()

    def forward(self, x):
        if not self.asks:
            return self.inner(x)
        negative = x[0, 0, 0].item() < 0
        self.went.add(negative)
        return -self.inner(x) if negative else self.inner(x)


@pytest.mark.parametrize("asks", [True, False])
def test_a_forward_that_reads_a_tensors_content_is_known(asks):
    x = torch.ones(1, 3, 4)
    tape = recorded(Choosing(nn.Linear(4, 4), asks), x, {}, [])
    assert tape.reads_content == asks


@torch.no_grad()
def test_blocks_that_read_content_are_walked_all_the_same():
    """Windows go different ways, so that no recorded line holds for all of them."""
    adapter = Adapter(Tiny().load()[0])
    for block in adapter.blocks:
        block.mlp.act_fn = Choosing(block.mlp.act_fn, asks=True)
    windows = zoo.token_ids(count=6)
    stream = Stream(adapter, windows, tokens_at_once=windows.shape[1])
    for block in adapter.blocks:
        for _, arriving_there in stream.walk(block):
            assert len(list(arriving_there)) == len(windows)
        assert block.mlp.act_fn.went == {True, False}
    for window, walked in zip(windows, stream.leave()):
        expected = adapter.backbone(input_ids=window[None], use_cache=False).last_hidden_state
        torch.testing.assert_close(walked, expected, rtol=1e-5, atol=1e-5)
