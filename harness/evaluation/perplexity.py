"""Perplexity as the field reports it: exp of the mean next-token loss over non-overlapping windows.

    PPL = exp( 1/(W (L-1)) sum_w sum_{t=2..L} -log p(x_t | x_1..x_{t-1}) )

Each window starts afresh, its first token is never a target, the tail that fills no window is dropped before (windows.py).
Softmax in float32. Source: the GPTQ / QuaRot / SpinQuant / FP-Quant protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from harness.models.families import Adapter

LOGITS_AT_ONCE = 256  # tokens whose logits are held at a time; a vocabulary of 150,000 makes that 150 MB


@torch.no_grad()
def window_losses(adapter: Adapter, windows: Tensor, amp: torch.dtype | None = None,
                  advance: Callable[[], None] = lambda: None) -> Tensor:
    """Summed next-token loss of each window, float64 [W], in nats.

    windows: token ids [W, L]; amp: autocast dtype of the forward; advance: called after each window.
    """
    device = adapter.device
    losses = []
    for window in windows:
        ids = window.to(device)[None]
        with torch.autocast(device.type, dtype=amp) if amp is not None else nullcontext():
            hidden = adapter.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            loss = torch.zeros((), dtype=torch.float64, device=device)
            for states, targets in zip(hidden.split(LOGITS_AT_ONCE), ids[0, 1:].split(LOGITS_AT_ONCE)):
                logits = adapter.head(states).float()
                loss += nn.functional.cross_entropy(logits, targets, reduction="none").double().sum()
        losses.append(loss.cpu())
        advance()
    return torch.stack(losses)


def perplexity(losses: Tensor, length: int) -> float:
    """exp(mean loss a target); losses [W] as from `window_losses`, each over length - 1 targets."""
    return float(torch.exp(losses.sum() / (len(losses) * (length - 1))))
