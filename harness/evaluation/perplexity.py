"""Perplexity as the field reports it: exp of the mean next-token loss over non-overlapping windows.

    PPL = exp( 1/(W (L-1)) sum_w sum_{t=2..L} -log p(x_t | x_1..x_{t-1}) )

Each window starts afresh, its first token is never a target, the tail that fills no window is
dropped before (windows.py). Softmax in float32. Source: the GPTQ / QuaRot / SpinQuant / FP-Quant
protocol.

Streaming turns the loops around, all windows through one block before the next: the same
arithmetic, with one block in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from harness.calibration.stream import Stream
from harness.evaluation.base import Watch
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.parallel import ALONE, Ranks

# Tokens whose logits are held at a time; a vocabulary of 150,000 makes that 150 MB.
LOGITS_AT_ONCE = 256


@torch.no_grad()
def window_losses(
    adapter: Adapter,
    windows: Tensor,
    amp: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
    streaming: bool = False,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Summed next-token loss of each window, float64 [W], in nats.

    windows: token ids [W, L]; amp: autocast dtype of the forward; advance: called `steps` times;
    streaming: block by block; watch(window, position, states [T, hidden], logits [T, vocabulary]
    float32) sees what the losses come from, piece by piece. ranks: each passes its share, and has
    the losses of all.
    """
    device = adapter.device
    by = _by_block if streaming else _by_window
    losses: list[Tensor] = []
    with torch.autocast(device.type, dtype=amp) if amp is not None else nullcontext():
        piece = _piece(adapter, windows.shape[1])
        numbers = ranks.share(range(len(windows)))
        own = ranks.share(windows)
        # what computes stands first, so that it runs to its end
        for hidden, index, window in zip(by(adapter, own, advance), numbers, own):
            ids = window.to(device)
            loss = torch.zeros((), dtype=torch.float64, device=device)
            pieces = zip(hidden[:-1].split(piece), ids[1:].split(piece))
            for part, (states, targets) in enumerate(pieces):
                # A window is a batch of one, also to who quantizes tokens.
                logits = adapter.logits(states[None])[0].float()
                each = nn.functional.cross_entropy(logits, targets, reduction="none")
                loss += each.double().sum()
                if watch is not None:
                    watch(index, part * piece, states, logits)
            losses.append(loss.cpu())
    return torch.stack(ranks.merged(losses))


def _piece(adapter: Adapter, length: int) -> int:
    """Tokens that pass the head at a time: all of a window where a scale of its input is taken over
    more than one."""
    if isinstance(adapter.head, QuantLinear):
        act = adapter.head.site.format
        if act is not None and act.spans_tokens:
            return length
    return LOGITS_AT_ONCE


def steps(adapter: Adapter, windows: Tensor, streaming: bool) -> int:
    """How often `window_losses` calls advance."""
    return len(adapter.blocks) if streaming else len(windows)


def _by_window(adapter: Adapter, windows: Tensor, advance: Callable[[], None]) -> Iterator[Tensor]:
    """Final hidden states [L, hidden], window by window."""
    for window in windows:
        ids = window.to(adapter.device)[None]
        yield adapter.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        advance()


def _by_block(adapter: Adapter, windows: Tensor, advance: Callable[[], None]) -> Iterator[Tensor]:
    """The same, all windows through one block before the next."""
    stream = Stream(adapter, windows, tokens_at_once=windows.shape[1])
    for index, block in enumerate(adapter.blocks):
        with adapter.open(index):
            stream.advance(block)
        advance()
    for hidden in stream.leave():
        yield hidden[0]


def perplexity(losses: Tensor, length: int) -> float:
    """exp(mean loss a target); losses [W] as from `window_losses`, each over length - 1 targets."""
    return float(torch.exp(losses.sum() / (len(losses) * (length - 1))))
