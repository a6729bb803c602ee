"""A loaded model seen through its structure: blocks, sites, and the linears that read them.

Nothing here knows a module's name: all of them come from harness/structure, which derives them from
a recorded forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.codecs.placement import HEAD_SITE
from harness.formats import Scheme
from harness.libraries.transformers import Given
from harness.models.quant_linear import QuantLinear
from harness.models.source import BlockStorage
from harness.structure.composite import decoder_of
from harness.structure.derive import derive
from harness.structure.site import Norm, Site
from harness.structure.skeleton import skeleton
from harness.structure.structure import Structure
from harness.transforms import ModelShape, Role


def roles_of(structure: Structure) -> dict[str, Role]:
    """{absolute module name: Role} of all that a codec may be merged into.

    That is the embedding, the norms and the matrices, in the order of the forward.
    """
    embedding = structure.embedding
    roles = {embedding: Role(None, embedding, "embedding", writes="residual")}
    for layer, sites in enumerate(structure.sites):
        start = f"{structure.blocks}.{layer}."
        fed = {site.feed.matrix: site for site in sites if site.feed is not None}
        for site in sites:
            if site.norm is not None and site.norm.kind.gain != "1":
                roles.setdefault(site.norm.module, _norm(layer, start, site.norm, site.activation))
            for matrix in site.matrices:
                feeds = fed.get(matrix.parameter)
                writes = _written(structure, matrix.parameter, feeds)
                role = Role(
                    layer,
                    matrix.name,
                    "linear",
                    site.activation,
                    reads_residual=site.residual,
                    writes=writes,
                    heads=None if site.feed is None else site.feed.grouped,
                    rows=_rows(feeds) if writes != "residual" else None,
                    swapped=matrix.quantize,
                )
                for name in site.names(matrix):
                    roles[start + name] = replace(role, name=name)
    if structure.final_norm is not None and structure.final_norm.kind.gain != "1":
        roles[structure.final_norm.module] = _norm(None, "", structure.final_norm, HEAD_SITE)
    # positions may be looked up in a table too
    for parameter in structure.residual.writers:
        table = parameter.removesuffix(".weight")
        if table not in roles and not parameter.endswith("bias"):
            roles[table] = Role(None, table, "embedding", writes="residual")
    head = structure.head
    roles[head] = Role(None, head, "linear", HEAD_SITE, reads_residual=True)
    return roles


def _norm(layer: int | None, start: str, norm: Norm, site: str) -> Role:
    """The role of the norm before a site."""
    name = norm.module.removeprefix(start)
    turned = norm.residual and norm.kind.bias
    return Role(layer, name, "norm", writes=site, reads_residual=turned, gain=norm.kind.gain)


def _written(structure: Structure, parameter: str, fed: Site | None) -> str | None:
    """What a matrix writes: the residual stream, the site it feeds, or nothing by a linear path."""
    if parameter in structure.residual.writers:
        return "residual"
    return None if fed is None else fed.name


def _rows(fed: Site | None) -> tuple[int, ...] | None:
    """Which of its outputs a matrix feeds a site with; None: all."""
    return None if fed is None or fed.feed is None else fed.feed.partial


def structure_of(config) -> Structure:
    """The structure of the models of a transformers config, without weights."""
    return derive(skeleton(config))


def shape_of(
    structure: Structure, scheme: Scheme, seed: int = 0, solver: str | None = None
) -> ModelShape:
    """What a transform may know of a model before its weights are loaded."""
    heads = next(iter(structure.attention.values()), None)
    return ModelShape(
        widths=structure.widths,
        layers=structure.layers,
        heads=0 if heads is None else heads.heads,
        kv_heads=0 if heads is None else heads.kv_heads,
        head_dim=structure.head_dim,
        scheme=scheme,
        seed=seed,
        solver=solver,
        readers=structure.linears,
        structure=structure,
    )


class Adapter:
    """A loaded model seen through its structure: blocks, sites and the linears at them."""

    def __init__(
        self,
        model,
        offloaded: BlockStorage | None = None,
        structure: Structure | None = None,
    ):
        """model: transformers' language model, which may see or hear too.

        offloaded: where the blocks are while they are not in use (models/offload.py); None: all are
        in memory. structure: as derived before; None: from the model's config.
        """
        self.model = model
        self.offloaded = offloaded
        self.structure = structure or structure_of(model.config)
        self.roles = roles_of(self.structure)
        self._sites = [self.structure.expanded(layer) for layer in range(self.structure.layers)]

    @property
    def blocks(self):
        """The decoder blocks, in order."""
        return self.model.get_submodule(self.structure.blocks)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_submodule(self.structure.embedding).weight.device

    @property
    def decoder(self):
        """What holds the blocks and their attention: the model, without towers."""
        return decoder_of(self.model)

    @property
    def backbone(self):
        """The model without its head: tokens [B, L] -> hidden states [B, L, hidden]."""
        return self.model.get_submodule(self.structure.blocks.rpartition(".")[0])

    @property
    def head(self):
        """The output projection: hidden states -> logits."""
        return self.model.get_submodule(self.structure.head)

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """The logits [B, T, vocabulary] of what the backbone gives, hidden [B, T, n].

        As the model makes them of its head's output, scaled or capped. head: in place of its own.
        """
        if self.structure.plain_head:
            return (head or self.head)(hidden)
        path = self.structure.blocks.rpartition(".")[0]
        backbone = self.backbone
        own = self.head
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            self.model.set_submodule(path, Given(hidden, backbone))
            self.model.set_submodule(self.structure.head, head or own)
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.model.set_submodule(path, backbone)
            self.model.set_submodule(self.structure.head, own)

    def open(self, layer: int | None, write: bool = False) -> AbstractContextManager:
        """Within it the weights of block `layer` are in memory; write: changes to them last.

        None is outside the blocks.
        """
        if self.offloaded is None or layer is None:
            return nullcontext()
        return self.offloaded.open(layer, write)

    def sites(self, index: int) -> tuple[Site, ...]:
        """The sites of block `index` at which something is quantized, in their order."""
        return self._sites[index]

    def weights(self, parameter: str, axis: int) -> list[Tensor]:
        """The matrices [out, in] that a parameter is by now, by the axis it was read along.

        A swapped linear's is turned already, and experts have one each.
        """
        owner, _, leaf = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        found = getattr(module, leaf)
        if isinstance(found, nn.ModuleList):
            return [linear.get_buffer("weight") for linear in found]
        return [found if isinstance(module, QuantLinear) else found.movedim(axis, -1)]

    def shows(self, index: int, site: Site) -> bool:
        """Whether a site's tensor is not shown as a whole by another site of the block."""
        return site.expert is None or not any(
            other.expert is None and other.activation == site.activation
            for other in self.sites(index)
        )

    def name(self, index: int, linear: str) -> str:
        """The absolute name of a block-relative module."""
        return f"{self.structure.blocks}.{index}.{linear}"

    def linears(self, index: int, site: Site) -> dict:
        """Block-relative name -> module for the linears that read `site` in block `index`."""
        block = self.blocks[index]
        return {name: block.get_submodule(name) for name in site.linears}

    def width(self, site: Site, index: int = 0) -> int:
        """Features of the site's activation, from the module that reads it."""
        return self.blocks[index].get_submodule(site.linears[0]).in_features
