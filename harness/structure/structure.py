"""A decoder as its parts: the sites of its blocks, its residual stream, its attention.

The *residual stream* is what embedding and blocks write by addition, and what sites read behind a
norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.structure.norms import NormKind
from harness.structure.site import Norm, Site


@dataclass(frozen=True)
class Residual:
    """What may be done to the residual stream.

    group: `O(n)`: any rotation (RMS norms); `fixes 1`: one that leaves the vector of ones alone
    (LayerNorm); None: none, and why says so. writers, readers: {parameter: its axis} of all that
    writes or reads the stream. fused: {norm: [(parameter, axis) of what reads it]}.
    """

    group: str | None
    why: tuple[str, ...]
    writers: Mapping[str, int]
    readers: Mapping[str, int]
    fused: Mapping[str, tuple[tuple[str, int], ...]]
    norms: Mapping[str, NormKind]


@dataclass(frozen=True)
class Attention:
    """One block's attention as its scores are computed.

    features: (of a query and key, of a value), one head's. module: block-relative; None where no
    other attention can be put in its place, and why says so.
    """

    heads: int
    kv_heads: int
    features: tuple[int, int]
    module: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class Structure:
    """A decoder.

    blocks, embedding, head, final_norm: absolute names. hidden: width of the residual stream.
    returned: how many results a block returns in a tuple, hidden states first; 0: those alone.
    plain_head: whether the logits are what the head gives of what the final norm gives, neither
    scaled nor capped. sites: of every block, in the order of its forward. attention: {layer:
    Attention} of those that have one. towers: absolute names of what stands beside the decoder in a
    model that sees or hears too, and stays as it is. joined: why its blocks cannot be taken one by
    one, if so.
    """

    architecture: str
    blocks: str
    embedding: str
    head: str
    final_norm: Norm | None
    hidden: int
    returned: int
    plain_head: bool
    sites: tuple[tuple[Site, ...], ...]
    residual: Residual
    attention: Mapping[int, Attention]
    towers: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    def beside(self, parameter: str) -> bool:
        """Whether a parameter, by its absolute name, stands beside the decoder."""
        return any(parameter == each or parameter.startswith(f"{each}.") for each in self.towers)

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return len(self.sites)

    def site(self, name: str, layer: int) -> Site | None:
        """The site of that name in a block."""
        return next((site for site in self.sites[layer] if site.name == name), None)

    def merges(self, name: str) -> tuple[int, ...]:
        """The blocks in which what stands before a site can take a scale."""
        sites = ((layer, self.site(name, layer)) for layer in range(self.layers))
        return tuple(layer for layer, site in sites if site is not None and site.merges)

    @property
    def turns(self) -> tuple[int, ...]:
        """The blocks in which what makes attention's values can take a matrix of each head."""
        sites = ((layer, self.site("o_in", layer)) for layer in range(self.layers))
        return tuple(layer for layer, site in sites if site is not None and site.turns)

    @property
    def head_dim(self) -> int:
        """Features of a value in one head of the first block that attends; 0 where none does."""
        first = next(iter(self.attention.values()), None)
        return 0 if first is None else first.features[1]

    @property
    def mixes(self) -> bool:
        """Whether there are routed experts among what is quantized."""
        return any(site.experts for sites in self.sites for site in sites)

    @property
    def unmet(self) -> str | None:
        """Why nothing can be put between queries, keys and values; None where it can in all blocks
        that attend.
        """
        if not self.attention:
            return "no block attends"
        return next((each.why for each in self.attention.values() if each.module is None), None)

    @property
    def scored(self) -> frozenset[str]:
        """Block-relative names of the matrices that queries and keys are made by."""
        return frozenset(
            matrix.name
            for sites in self.sites
            for site in sites
            for matrix in site.matrices
            if matrix.scored
        )

    @property
    def float_experts(self) -> tuple[str, ...]:
        """Block-relative names of experts that nothing can be put in place of."""
        found = {
            matrix.name: None
            for sites in self.sites
            for site in sites
            for matrix in site.matrices
            if matrix.experts and not matrix.quantize
        }
        return tuple(found)

    @property
    def widths(self) -> dict[str, int]:
        """{activation: features} of what is quantized; of the first block where blocks differ."""
        widths: dict[str, int] = {}
        for sites in self.sites:
            for site in sites:
                if site.linears:
                    widths.setdefault(site.activation, site.width)
        return widths

    @property
    def linears(self) -> dict[str, tuple[str, ...]]:
        """{activation: block-relative names of what is quantized there}, of all blocks together."""
        linears: dict[str, dict[str, None]] = {}
        for layer in range(self.layers):
            for site in self.expanded(layer):
                linears.setdefault(site.activation, {}).update(dict.fromkeys(site.linears))
        return {name: tuple(found) for name, found in linears.items()}

    def expanded(self, layer: int) -> tuple[Site, ...]:
        """The sites of a block at which something is quantized, those of each expert by itself.

        What all experts read first comes before what they read within.
        """
        sites: list[Site] = []
        routed = [site for site in self.sites[layer] if site.linears and site.experts]
        for site in self.sites[layer]:
            if site in routed[:1]:
                sites += [each.of(expert) for each in routed for expert in range(site.experts)]
            elif site.linears and not site.experts:
                sites.append(site)
        return tuple(sites)

    @property
    def kinds(self) -> list[list[int]]:
        """Layers whose blocks have the same sites, by kind."""
        kinds: dict[tuple, list[int]] = {}
        for layer, sites in enumerate(self.sites):
            kinds.setdefault(tuple(map(_shape, sites)), []).append(layer)
        return list(kinds.values())


def _shape(site: Site) -> tuple:
    """What makes blocks one kind, of one site."""
    matrices = tuple((matrix.name, matrix.experts) for matrix in site.matrices)
    return site.name, site.width, matrices, site.why
