"""One decoder block as a solver sees it that looks beyond a site (solvers.Block).

BlockScales    which of a block's sites take a scale, and merging one
BlockView      its forward with other weights, what its sites read, the modules around them
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness.calibration.recording import arguments_at
from harness.calibration.stream import Stream
from harness.calibration.subject import Log, Stage, quiet, unlogged
from harness.formats import Format, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import place
from harness.models.quant_linear import SiteInput
from harness.solvers.block import Part
from harness.structure.site import Site
from harness.structure.tape import tensors_of
from harness.transforms import Diagonal, Placement

PROBE = 4096  # tokens on which `inputs` and `parent` work


class BlockScales:
    """The sites of block `index` of a swapped model, and the scales merged into them.

    `merged` {site: s} collects what `merge` did.
    """

    def __init__(self, adapter: Adapter, index: int):
        self.adapter = adapter
        self.index = index
        self.block: nn.Module = adapter.blocks[index]
        self.merged: dict[str, Tensor] = {}

    def merge(self, site: str, scale: Tensor) -> None:
        """Divide a site's activation by s [n] for good: 1/s into what feeds it, s into readers."""
        heads = self._heads(site)
        values = scale
        if heads is not None and self.scalable(site) != "free":
            # what feeds the site has one value a key/value head, whose readers share its scale
            values = _per_head(scale, heads)[:, 0].flatten()
        place(self.adapter, Placement(merged={(self.index, site): Diagonal(values.double())}))
        self.merged[site] = scale

    def scalable(self, site: str) -> str:
        """free | shared | fixed; see solvers.Block."""
        if self._input(self._find(site)).codec is not None or not self._find(site).merges:
            return "fixed"
        heads = self._heads(site)
        return "free" if heads is None or heads[1] == 1 else "shared"

    def share(self, site: str, values: Tensor) -> Tensor:
        """values [n] averaged over the features that must share a scale."""
        heads = self._heads(site)
        if heads is None or self.scalable(site) == "free":
            return values
        grouped = _per_head(values, heads)
        return grouped.mean(1, keepdim=True).expand_as(grouped).flatten()

    def _heads(self, site: str) -> tuple[int, int] | None:
        """(key/value heads, query heads on each) where the site holds the heads' values."""
        reader = self._find(site).linears[0]
        return self.adapter.roles[self.adapter.name(self.index, reader)].heads

    def _find(self, name: str) -> Site:
        """The site of that name."""
        return next(site for site in self.adapter.sites(self.index) if site.name == name)

    def _input(self, site: Site) -> SiteInput:
        """What all linears of a site read through."""
        shared = self.block.get_submodule(site.linears[0]).site
        assert isinstance(shared, SiteInput)
        return shared


class BlockView(BlockScales):
    """A block before its weights are quantized, with the stream that has reached it.

    original, targets: see solvers.Block; empty where the solver needs none.
    """

    def __init__(
        self,
        adapter: Adapter,
        scheme: Scheme,
        index: int,
        stream: Stream,
        generator: torch.Generator,
        stage: Stage = quiet,
        log: Log = unlogged,
    ):
        super().__init__(adapter, index)
        self.scheme = scheme
        self.stream = stream
        self.ranks = stream.ranks
        self._generator = generator
        self._stage = stage
        self._log = log
        self.sites: Mapping[str, tuple[str, ...]] = {
            site.name: site.linears for site in adapter.sites(index)
        }
        self.formats: Mapping[str, Format] = scheme.weights(index, self._linears())
        self.original: Sequence[Tensor] = ()
        self.targets: Sequence[Tensor] = ()
        self._cached: tuple[str, list[tuple[tuple, dict]]] = ("", [])

    def _linears(self) -> list[str]:
        """The block-relative names of all linears, in the order of the forward."""
        return [name for linears in self.sites.values() for name in linears]

    @property
    def weights(self) -> dict[str, Tensor]:
        """{name: [out, in]} of all linears."""
        return {name: self.block.get_buffer(f"{name}.weight") for name in self._linears()}

    @property
    def quantized(self) -> tuple[Tensor, ...]:
        """The hidden states that came through the solved blocks, one a micro-batch."""
        return self.stream.hidden

    @property
    def batches(self) -> list[list[Part]]:
        parts: list[list[Part]] = [[] for _ in self.stream.batches]
        passing = zip(self.stream.places, self.quantized)
        for index, ((batch, row), hidden) in enumerate(passing):
            rows = slice(row, row + len(hidden))
            parts[batch].append(Part(index, rows, len(hidden) / self.stream.batches[batch]))
        return parts

    def draws(self, batch: int) -> list[Tensor]:
        if not self.quantized:
            return []
        # all ranks draw for all of the batch, as one process does
        shape = (self.stream.batches[batch], *self.quantized[0].shape[1:])
        drawn = torch.rand(shape, generator=self._generator)
        return [drawn[part.rows] for part in self.batches[batch]]

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        return self._stage(title, total)

    def log(self, values: dict, step: int) -> None:
        self._log(values, step)

    def forward(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The block's output for micro-batch `index`, with some weights replaced."""
        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        context = self.stream.block_kwargs[self.block][index]
        return tensors_of(functional_call(self.block, replaced, (hidden,), context))[0]

    def inputs(self, site: str) -> Tensor:
        """What a site reads of the first micro-batches, [tokens, n], in the unquantized block."""
        reader = self._find(site).linears[0]
        return torch.cat([args[0].flatten(0, -2) for args, _ in self._arriving(reader)])

    def parent(
        self, site: str, weights: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """What the module around a site makes of `inputs`, some weights replaced [tokens, m].

        With a scale s [n], the site's activation is read as Q_a(x / s) s.
        """
        end = self._find(site)
        around = _around(end.linears)
        module = self.block.get_submodule(around)
        replaced = {
            f"{name}.weight".removeprefix(f"{around}."): weight for name, weight in weights.items()
        }
        outputs = []
        with self._reading(end, scale):
            for args, kwargs in self._calls(around):
                output = tensors_of(functional_call(module, replaced, args, kwargs))[0]
                outputs.append(output)
        return torch.cat([y.flatten(0, -2) for y in outputs])

    def merge(self, site: str, scale: Tensor) -> None:
        """As BlockScales; what the sites read is no longer what it was."""
        super().merge(site, scale)
        self._cached = ("", [])

    def _calls(self, name: str) -> list[tuple[tuple, dict]]:
        """What a module of the unquantized block is called with, PROBE tokens in all.

        The last one's are kept, for a search asks again and again.
        """
        if self._cached[0] != name:
            self._cached = (name, list(self._arriving(name)))
        return self._cached[1]

    def _arriving(self, name: str) -> Iterator[tuple[tuple, dict]]:
        """What `_calls` keeps, as the block runs up to the module."""
        module = self.block.get_submodule(name)
        for hidden, kwargs in self.stream.leading(self.block, PROBE):

            def run(hidden=hidden, kwargs=kwargs):
                return self.block(hidden, **kwargs)

            yield arguments_at(module, run)

    @contextmanager
    def _reading(self, site: Site, scale: Tensor | None) -> Iterator[None]:
        """Within it, the site's activation is quantized under x / s.

        Where no scale is given, or activations are not quantized, nothing changes.
        """
        shared = self._input(site)
        act = self.scheme.part("act", self.index, site.linears[0])
        if scale is None or act is None:
            yield
            return
        before = shared.codec, shared.format, shared.decoder
        shared.codec = Diagonal(scale)
        shared.format = act.dynamic()
        shared.decoder = Diagonal(scale)
        try:
            yield
        finally:
            shared.codec, shared.format, shared.decoder = before


def _around(linears: Sequence[str]) -> str:
    """The innermost module around linears, by their block-relative names; one is its own."""
    if len(linears) == 1:
        return linears[0]
    return os.path.commonpath([name.replace(".", "/") for name in linears]).replace("/", ".")


def _per_head(values: Tensor, heads: tuple[int, int]) -> Tensor:
    """values [n] -> [kv_heads, repeat, head_dim]."""
    return values.view(*heads, -1)
