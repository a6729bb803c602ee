"""The loaded model as a transform sees it: its weights, its activations, its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from harness.calibration.stream import Stream
from harness.codecs.placement import HEAD_SITE, Role, Where
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.unmerged import unmerged
from harness.parallel import ALONE, Ranks
from harness.structure.tape import tensors_of
from harness.transforms import Placement
from harness.transforms.calibration_model import Collector

T = TypeVar("T")
# A progress bar (title, total), which yields `advance(note="")`; and what takes points of curves.
Stage = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
Log = Callable[[dict, int], None]
HELD = 10  # every tenth calibration window, from the end, is kept to choose the best iterate by


@contextmanager
def quiet(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A stage that shows nothing."""
    yield lambda note="": None


def unlogged(values: dict, step: int) -> None:
    """Points of a curve that nobody keeps."""


@dataclass
class FloatBlockView:
    """See calibration_model.FloatBlock. kwargs: what it is called with besides, one a window.

    Good until the stream it was cut from goes on.
    """

    index: int
    block: nn.Module
    inputs: Mapping[int, Tensor]
    targets: Mapping[int, Tensor]
    kwargs: Mapping[int, dict]
    train: Tensor
    held: Tensor

    def forward(self, window: int) -> Tensor:
        return tensors_of(self.block(self.inputs[window], **self.kwargs[window]))[0]


class StreamedModel:
    """A swapped model with calibration windows [N, L].

    stage(title, total) shows progress; gains are what `fuse_norms` gave, if the norms are fused;
    log(values, step) keeps points of curves; texts: of how many the windows are in turn, each of
    which is in `train` and in `held` then; ranks: those that share its windows. See
    transforms.CalibrationModel.
    """

    def __init__(
        self,
        adapter: Adapter,
        windows: Tensor,
        stage: Stage = quiet,
        gains: Mapping[Where, Tensor] | None = None,
        log: Log = unlogged,
        texts: int = 1,
        ranks: Ranks = ALONE,
    ):
        self.adapter = adapter
        self.roles: Mapping[str, Role] = adapter.roles
        self.device = adapter.device
        self.gains: Mapping[Where, Tensor] = gains or {}
        self._stage = stage
        self._log = log
        self.ranks = ranks
        self.windows = windows
        self.train = windows
        self.held = windows
        if len(windows) > texts:  # a single window of a text has to serve as both
            count = max(texts, len(windows) // HELD)
            self.train = windows[:-count]
            self.held = windows[-count:]
        self.held_from = len(windows) - len(self.held)

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        return self._stage(title, total)

    def log(self, values: dict, step: int) -> None:
        self._log(values, step)

    def weight(self, layer: int, linear: str) -> Tensor:
        with self.adapter.open(layer):
            return self.adapter.blocks[layer].get_submodule(linear).weight

    @torch.no_grad()
    def observe(
        self,
        collector: Callable[[int | None, str, int], Collector[T]],
        sites: Iterable[str],
        title: str,
        note: Callable[[dict[Where, T]], str] = lambda results: "",
    ) -> dict[Where, T]:
        observed = set(sites)
        results: dict[Where, T] = {}
        # experts as the router feeds them, together: one that got little adds little
        stream = Stream(self.adapter, self.windows, enough=0, ranks=self.ranks)
        with self.stage(title, len(self.adapter.blocks)) as advance:
            for layer, block in enumerate(self.adapter.blocks):
                with self.adapter.open(layer):
                    shared: dict[str, Collector[T]] = {}
                    for site, activations in stream.walk(block):
                        name = site.activation
                        if name not in observed or not self.adapter.shows(layer, site):
                            continue
                        # experts are shown rows of one tensor, one expert after another
                        gathered = shared.get(name)
                        if gathered is None:
                            width = self.adapter.width(site, layer)
                            gathered = shared[name] = collector(layer, name, width)
                        # every rank gathers all, in the text's order, and so finds the same
                        for x in self.ranks.in_turn(activations):
                            gathered.add(x)
                        if site.expert is None:
                            results[layer, name] = shared.pop(name).finish()
                    for name, gathered in shared.items():
                        results[layer, name] = gathered.finish()
                advance(note(results))
        if HEAD_SITE in observed:
            gathered = collector(None, HEAD_SITE, self.adapter.head.weight.shape[1])
            for x in self.ranks.in_turn(stream.leave()):
                gathered.add(x)
            results[None, HEAD_SITE] = gathered.finish()
        return results

    def unmerged(
        self,
        placement: Placement,
        scheme: Scheme | None,
        stored: bool = False,
        layer: int | None = None,
    ) -> AbstractContextManager:
        return unmerged(self.adapter, placement, scheme, stored, layer)

    def blocks(self) -> Iterator[FloatBlockView]:
        # a window at a time, each with what the block is called with beside it
        length = self.windows.shape[1]
        stream = Stream(self.adapter, self.windows, tokens_at_once=length, ranks=self.ranks)
        count = len(self.windows)
        own = self.ranks.share(range(count))
        train = torch.arange(len(self.train))
        held = torch.arange(count - len(self.held), count)
        for layer, block in enumerate(self.adapter.blocks):
            with self.adapter.open(layer):
                inputs = dict(zip(own, (hidden.clone() for hidden in stream.hidden)))
                with torch.no_grad():
                    stream.advance(block)
                targets = dict(zip(own, stream.hidden))
                kwargs = dict(zip(own, stream.block_kwargs[block]))
                yield FloatBlockView(layer, block, inputs, targets, kwargs, train, held)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        output = self.adapter.backbone(input_ids=ids.to(self.device), use_cache=False)
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        return self.adapter.logits(hidden)
