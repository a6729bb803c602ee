"""One decoder block as a solver that looks beyond a site sees it (solvers.Block): its forward with
other weights, what its sites read, the modules around them, and scales merged into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

from harness.calibration.stream import Stream, arguments_at
from harness.calibration.subject import quiet, unlogged
from harness.formats import Scheme
from harness.models.adapter import Adapter, Branch, Site
from harness.models.merge import place
from harness.transforms import Diagonal, Placement

PROBE = 4096  # tokens on which `inputs` and `parent` work


class BlockView:
    """Block `index` of a swapped model before its weights are quantized, with the stream that has
    reached it.

    `merged` {site: s} collects what `merge` did. original, targets: see solvers.Block; empty where
    the solver needs none.
    """

    def __init__(
        self,
        adapter: Adapter,
        scheme: Scheme,
        index: int,
        stream: Stream,
        generator: torch.Generator,
        stage: Callable[[str, int], AbstractContextManager] = quiet,
        log: Callable[[dict, int], None] = unlogged,
    ):
        self.adapter, self.scheme, self.index, self.stream = adapter, scheme, index, stream
        self.generator, self.stage, self.log = generator, stage, log
        self.block = adapter.blocks[index]
        self.sites = {site.name: site.linears for site in adapter.family.sites}
        self.formats = scheme.weights(
            index, [name for linears in self.sites.values() for name in linears]
        )
        self.original: Sequence[Tensor] = ()
        self.targets: Sequence[Tensor] = ()
        self.merged: dict[str, Tensor] = {}
        self._kept: tuple[str, list[tuple[int, Tensor]]] = ("", [])

    @property
    def weights(self) -> dict[str, Tensor]:
        return {
            name: self.block.get_submodule(name).weight
            for linears in self.sites.values()
            for name in linears
        }

    @property
    def quantized(self) -> tuple[Tensor, ...]:
        return self.stream.hidden

    def forward(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        return functional_call(
            self.block, replaced, (hidden,), self.stream.block_kwargs[self.block][index]
        )

    def inputs(self, site: str) -> Tensor:
        return torch.cat([x.flatten(0, -2) for _, x in self._read(site)])

    def parent(
        self, site: str, weights: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        branch, end = self._find(site)
        around = branch.module if end is branch.entry else end.linears[0]
        module = self.block.get_submodule(around)
        replaced = {
            f"{name}.weight".removeprefix(f"{around}."): weight for name, weight in weights.items()
        }
        outputs = []
        with self._reading(end, scale):
            for index, x in self._read(site):
                context = (
                    self.stream.block_kwargs[self.block][index]
                    if end is branch.entry and branch.context
                    else {}
                )
                output = functional_call(module, replaced, (x,), context)
                outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat([y.flatten(0, -2) for y in outputs])

    def merge(self, site: str, scale: Tensor) -> None:
        own = (
            scale if self.scalable(site) == "free" else self._per_head(site, scale)[:, 0].flatten()
        )
        place(self.adapter, Placement(merged={(self.index, site): Diagonal(own.double())}))
        self.merged[site] = scale
        self._kept = ("", [])

    def scalable(self, site: str) -> str:
        _, end = self._find(site)
        if self.block.get_submodule(end.linears[0]).site.codec is not None:
            return "fixed"
        heads = self._heads(site)
        return "free" if heads is None or heads[1] == 1 else "shared"

    def share(self, site: str, values: Tensor) -> Tensor:
        if self.scalable(site) == "free":
            return values
        heads = self._per_head(site, values)
        return heads.mean(1, keepdim=True).expand_as(heads).flatten()

    def _heads(self, site: str) -> tuple[int, int] | None:
        """(key/value heads, query heads on each) where the site holds the heads' values."""
        _, end = self._find(site)
        return self.adapter.roles[self.adapter.name(self.index, end.linears[0])].heads

    def _per_head(self, site: str, values: Tensor) -> Tensor:
        """values [n] -> [kv_heads, repeat, head_dim]."""
        return values.view(*self._heads(site), -1)

    def _find(self, name: str) -> tuple[Branch, Site]:
        return next(
            (b, s)
            for b in self.adapter.family.branches
            for s in (b.entry, b.exit)
            if s.name == name
        )

    def _read(self, site: str) -> list[tuple[int, Tensor]]:
        """(micro-batch, what the site reads before any encoder) of the unquantized block, PROBE
        tokens in all; the last site's are kept, for a search asks again and again.
        """
        if self._kept[0] != site:
            self._kept = (site, list(self._arriving(site)))
        return self._kept[1]

    def _arriving(self, site: str) -> Iterator[tuple[int, Tensor]]:
        _, end = self._find(site)
        reader = self.block.get_submodule(end.linears[0])
        left = PROBE
        for index, hidden in enumerate(self.stream.hidden):
            if left <= 0:
                return

            def run(index=index, hidden=hidden):
                return self.block(hidden, **self.stream.block_kwargs[self.block][index])

            args, _ = arguments_at(reader, run)
            left -= hidden.shape[0] * hidden.shape[1]
            yield index, args[0]

    @contextmanager
    def _reading(self, site: Site, scale: Tensor | None) -> Iterator[None]:
        """Within it, the site's activation is quantized under x / s, where a scale is given and
        activations are quantized.
        """
        shared = self.block.get_submodule(site.linears[0]).site
        act = self.scheme.part("act", self.index, site.linears[0])
        if scale is None or act is None:
            yield
            return
        before = shared.codec, shared.format, shared.decoder
        shared.codec, shared.format, shared.decoder = (
            Diagonal(scale),
            act.dynamic(),
            Diagonal(scale),
        )
        try:
            yield
        finally:
            shared.codec, shared.format, shared.decoder = before
