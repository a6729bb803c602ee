"""The perplexity of two windows by hand, the dropped tail, and a model that knows nothing."""

import math

import pytest
import torch

from harness.calibration.windows import windows
from harness.evaluation.perplexity import LOGITS_AT_ONCE, perplexity, window_losses
from harness.formats import NVFP4
from harness.models.adapter import Adapter
from harness.models.merge import swap_head
from harness.models.tiny import VOCABULARY, Tiny

LENGTH = 300  # more than the tokens whose logits are held at once, and no multiple of them


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return Tiny(family=request.param, tie=False).load()[0]


def ids(count):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(3))


def test_two_windows_by_hand(model):
    tokens = ids(2 * LENGTH + 17)
    cut = windows(tokens, LENGTH, None)
    assert cut.shape == (2, LENGTH)
    total = 0.0
    with torch.no_grad():
        for start in (0, LENGTH):
            window = tokens[start : start + LENGTH]
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
            for t in range(1, LENGTH):
                total -= float(log_p[t - 1, window[t]])
    got = perplexity(window_losses(Adapter(model), cut), LENGTH)
    assert got == pytest.approx(math.exp(total / (2 * (LENGTH - 1))), rel=1e-6)


def test_tail_is_dropped(model):
    tokens = ids(2 * LENGTH + 17)
    changed = torch.cat([tokens[: 2 * LENGTH], ids(17).flip(0)])
    losses = [window_losses(Adapter(model), windows(t, LENGTH, None)) for t in (tokens, changed)]
    assert torch.equal(*losses)


def test_constant_logits_give_the_vocabulary_size(model):
    saved = model.lm_head.weight.data
    model.lm_head.weight.data = torch.zeros_like(saved)
    try:
        losses = window_losses(Adapter(model), ids(2 * LENGTH).view(2, LENGTH))
    finally:
        model.lm_head.weight.data = saved
    assert perplexity(losses, LENGTH) == pytest.approx(VOCABULARY, rel=1e-6)


def test_progress_is_told_once_a_window(model):
    calls = []
    window_losses(Adapter(model), ids(3 * 40).view(3, 40), advance=lambda: calls.append(1))
    assert len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize("scope", ["tensor", "token"])
def test_a_head_whose_scale_spans_tokens_reads_a_window_at_once(scope):
    """Not the pieces in which logits are made: their number is no setting of the run."""
    adapter, length = Adapter(Tiny().load()[0]), 2 * LOGITS_AT_ONCE
    swap_head(adapter).site.format = NVFP4(role="activation", scope=scope)
    window = ids(length)
    hidden = adapter.backbone(window[None], use_cache=False).last_hidden_state[:, :-1]
    wanted = torch.nn.functional.cross_entropy(adapter.head(hidden)[0], window[1:], reduction="sum")
    torch.testing.assert_close(
        window_losses(adapter, window[None])[0].float(), wanted, rtol=1e-6, atol=0
    )
