"""The loaded model as a transform sees it: its weights, its activations on the calibration text,
its live forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from harness.calibration.stream import Stream
from harness.codecs.placement import HEAD_SITE
from harness.formats import Scheme
from harness.models.adapter import Adapter
from harness.models.unmerged import unmerged
from harness.transforms import Placement

HELD = (
    10  # every tenth of the calibration windows, at the end, is kept to choose the best iterate by
)


@contextmanager
def quiet(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A stage that shows nothing."""
    yield lambda note="": None


def unlogged(values: dict, step: int) -> None:
    """Points of a curve that nobody keeps."""


class StreamedModel:
    """A swapped model with calibration windows [N, L].

    stage(title, total) shows progress; gains are what `fuse_norms` gave, if the norms are fused;
    log(values, step) keeps points of curves. See transforms.CalibrationModel.
    """

    def __init__(
        self,
        adapter: Adapter,
        windows: Tensor,
        stage: Callable[[str, int], AbstractContextManager] = quiet,
        gains: Mapping[tuple[int | None, str], Tensor] | None = None,
        log: Callable[[dict, int], None] = unlogged,
    ):
        self.adapter, self.windows, self.stage, self.log = adapter, windows, stage, log
        self.roles, self.device, self.gains = adapter.roles, adapter.device, gains or {}
        held = max(1, len(windows) // HELD)
        self.train, self.held = (
            (windows[:-held], windows[-held:]) if len(windows) > 1 else (windows, windows)
        )

    def weight(self, layer: int, linear: str) -> Tensor:
        with self.adapter.open(layer):
            return self.adapter.blocks[layer].get_submodule(linear).weight

    @torch.no_grad()
    def observe(
        self,
        collector: Callable,
        sites: Iterable[str],
        title: str,
        note: Callable[[dict], str] = lambda found: "",
    ) -> dict:
        sites, found = set(sites), {}
        stream = Stream(self.adapter, self.windows)
        with self.stage(title, len(self.adapter.blocks)) as advance:
            for layer, block in enumerate(self.adapter.blocks):
                with self.adapter.open(layer):
                    for site, activations in stream.walk(block):
                        if site.name in sites:
                            kept = collector(layer, site.name, self.adapter.width(site))
                            for x in activations:
                                kept.add(x)
                            found[layer, site.name] = kept.finish()
                advance(note(found))
        if HEAD_SITE in sites:
            kept = collector(None, HEAD_SITE, self.adapter.head.weight.shape[1])
            for x in stream.leave():
                kept.add(x)
            found[None, HEAD_SITE] = kept.finish()
        return found

    def unmerged(self, placement: Placement, scheme: Scheme | None) -> AbstractContextManager:
        return unmerged(self.adapter, placement, scheme)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        return self.adapter.backbone(
            input_ids=ids.to(self.device), use_cache=False
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        return self.adapter.head(hidden)
