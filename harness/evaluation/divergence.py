"""How far a model's next-token distribution has moved from the untouched model's.

    KL    = mean_t sum_v p_t(v) log( p_t(v) / q_t(v) )
    top-1 = share of t with argmax p_t = argmax q_t

p: the untouched model, q: the changed one, t: positions of the first WINDOWS windows of a text; in
nats, float32 softmax. Perplexity sees one token of a distribution, KL all of them: it tells models
apart that the same perplexity does not.

Of the untouched model the final hidden states are kept with the baseline, and its output head for
the time of the run: a fiftieth of the logits they make.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.config.errors import DataError
from harness.models.adapter import Adapter
from harness.parallel import ALONE, Ranks
from harness.store import load_tensors, save_tensors

WINDOWS = 2  # a text; 4,000 positions tell KL to a few percent


class Reference:
    """The untouched model, as far as its distribution needs it: `head` and, {text: [W, L - 1,
    hidden]}, what it read."""

    def __init__(self, adapter: Adapter):
        """To be made before anything changes the model."""
        self.adapter = adapter
        self.head = copy.deepcopy(adapter.head).requires_grad_(False)
        self._states: dict[str, list[tuple[int, Tensor]]] = {}

    def recorder(self, text: str) -> Callable[[int, int, Tensor, Tensor], None]:
        """A `watch` of the untouched model's evaluation."""
        pieces: list[tuple[int, Tensor]] = []
        self._states[text] = pieces

        def watch(window: int, position: int, states: Tensor, logits: Tensor) -> None:
            if window < WINDOWS:
                pieces.append((window, states.cpu()))

        return watch

    def save(self, path: Path, ranks: Ranks = ALONE) -> None:
        """Keep what the recorders of all ranks saw, in one step."""
        states = {}
        for text, pieces in self._states.items():
            seen = [piece for own in ranks.gather(pieces) for piece in own]
            seen.sort(key=lambda piece: piece[0])  # stable: the pieces of a window stay in order
            states[text] = torch.cat([piece for _, piece in seen])
        if ranks.first:
            save_tensors(path, states)

    def compare(self, text: str, path: Path, length: int, ranks: Ranks = ALONE) -> Divergence:
        """A `watch` that measures another model on the windows [., length] of `text`.

        path: a file of `save`. Raises DataError where it is damaged by now.
        """
        record = ranks.lead(lambda: load_tensors(path))
        if record is None:
            raise DataError(
                f"{path} was damaged while this run went on; the same command measures it again."
            )
        hidden = record[0][text].unflatten(0, (-1, length - 1))
        head = self.head
        return Divergence(lambda x: self.adapter.logits(x[None], head)[0], hidden, ranks)


class Divergence:
    """A `watch` that adds up KL and agreement of the top token.

    head: hidden states [T, hidden] of the untouched model -> its logits. ranks: those that see
    windows of one text each.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], hidden: Tensor, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.head = head
        self.hidden = hidden
        self.positions = 0
        self._kl = 0.0
        self._same = 0.0

    def __call__(self, window: int, position: int, states: Tensor, logits: Tensor) -> None:
        if window >= len(self.hidden):
            return
        untouched = self.hidden[window, position : position + len(states)].to(states.device)
        p = self.head(untouched).float().log_softmax(-1)
        q = logits.log_softmax(-1)
        self._same += float((p.argmax(-1) == q.argmax(-1)).sum())
        # In place: a piece of logits of a large vocabulary takes 150 MB.
        self._kl += float((q.sub_(p).neg_() * p.exp_()).sum(dtype=torch.float64))
        self.positions += len(states)

    @property
    def figures(self) -> dict[str, float]:
        """{"kl": nats, "top1": share} of what all ranks saw, each of which has to ask."""
        seen = self.ranks.gather((self._kl, self._same, self.positions))
        kl, same, positions = map(sum, zip(*seen))
        return {"kl": kl / positions, "top1": same / positions}
