"""Matrices into a model: swapped linears, an untied head, bare norms, and the merge.

    RMSNorm(x) = x / rms(x) * gamma          W <- W diag(gamma) for every reader,   gamma <- 1

rms(x R) = rms(x), but diag(gamma) does not commute with R, so gamma moves into the linears that
read the norm: q, k, v from the input norm, gate and up from the second one, the head from the final
one. Biases stay. Query and key norms of Qwen3 act per head after the projections and are left
alone. The embedding mean is *not* subtracted: RMSNorm, unlike LayerNorm, sees it. Source: QuaRot
(arXiv 2404.00456) section 4, without its LayerNorm leftover.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.codecs.fold import fold
from harness.codecs.placement import HEAD_SITE
from harness.models.adapter import Adapter
from harness.models.attention import attach
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.models.source import untie
from harness.transforms import Chain, Codec, Placement, Role


def swap(adapter: Adapter) -> None:
    """Put a QuantLinear with the same weight in place of every linear of the blocks.

    Nothing is computed differently. What is swapped already, in a model from a checkpoint, stays as
    it is.
    """
    for index, block in enumerate(adapter.blocks):
        for site in adapter.sites(index):
            linears = {
                name: linear
                for name, linear in adapter.linears(index, site).items()
                if not isinstance(linear, QuantLinear)
            }
            # one for all of them, so that what they read is encoded and quantized once
            shared = SiteInput(len(linears))
            for name, linear in linears.items():
                block.set_submodule(name, _quant_linear(linear, shared))


def swap_head(adapter: Adapter) -> QuantLinear:
    """The same for the output head, untied first; found in place it is only returned."""
    untie(adapter.model)
    if not isinstance(adapter.head, QuantLinear):
        adapter.model.set_submodule(
            adapter.structure.head, _quant_linear(adapter.head, SiteInput(1))
        )
    return adapter.head


@torch.no_grad()
def fuse_norms(adapter: Adapter) -> dict[tuple[int | None, str], Tensor]:
    """Untie the head, merge every norm's gamma into its readers in float64, and set it to one.

    Returns {(layer, site): the gamma that was there}, float64 [hidden].
    """
    untie(adapter.model)
    gains = {}
    for layer, roles in _by_layer(adapter):
        with adapter.open(layer, write=True):
            for name, role in roles.items():
                if role.kind == "norm":
                    gamma = adapter.model.get_submodule(name).weight
                    gains[role.layer, role.writes] = gamma.detach().double().clone()
                    for reader, other in roles.items():
                        if other.reads == role.writes:
                            weight = adapter.model.get_submodule(reader).weight
                            weight.copy_(weight.double() * gamma.double())
                    gamma.fill_(1)
    return gains


@torch.no_grad()
def place(adapter: Adapter, placement: Placement) -> None:
    """Merge a placement into a swapped model's weights, and attach what stays online.

    Merged in float64 and parameter by parameter, so that one of them at a time is held twice.
    """
    head = placement.encoder(None, HEAD_SITE)
    # what is merged into the head must not reach the embedding
    if placement.residual is not None or head is not None:
        untie(adapter.model)
    if head is not None:
        swap_head(adapter)
    for layer, roles in _by_layer(adapter):
        changed = [
            name
            for name, role in roles.items()
            if placement.reading(role) or placement.writing(role)
        ]
        if not changed:
            continue
        with adapter.open(layer, write=True):
            for name in changed:
                for part in ("weight", "bias"):
                    tensor = getattr(adapter.model.get_submodule(name), part, None)
                    if tensor is not None:
                        key = f"{name}.{part}"
                        tensor.copy_(fold({key: tensor.double()}, placement, roles)[key])
    attach_online(adapter, placement)


def attach_online(adapter: Adapter, placement: Placement) -> None:
    """Attach what of a placement stays online.

    A codec goes behind what is there at its site, before the activation quantizer; R3 goes on
    queries and keys. What reads it is swapped, and its weights are as they are merged.
    """
    attached = set()
    for name, role in adapter.roles.items():
        if role.kind != "linear":
            continue
        codec = placement.encoder(role.layer, role.reads)
        if codec is None:
            continue
        site = adapter.model.get_submodule(name).site
        # every reader of a site names its codec, which encodes once
        if site in attached:
            continue
        attached.add(site)
        codec = _ready(codec, adapter)
        if site.codec is not None:
            codec = Chain([site.codec, codec])
        site.codec = codec
    if placement.query_key is not None:
        codec = _ready(placement.query_key, adapter)
        for heads in attach(adapter):
            heads.codec = codec


def _by_layer(adapter: Adapter) -> Iterator[tuple[int | None, dict[str, Role]]]:
    """(block or None, {name: role} of what stands there)."""
    layers: dict[int | None, dict[str, Role]] = {}
    for name, role in adapter.roles.items():
        layers.setdefault(role.layer, {})[name] = role
    yield from layers.items()


def _ready(codec: Codec, adapter: Adapter) -> Codec:
    """The codec where the model is, in the dtype it is computed in."""
    return codec.to(adapter.device, torch.promote_types(adapter.model.dtype, torch.float32))


def _quant_linear(linear: nn.Linear, site: SiteInput) -> QuantLinear:
    bias = None if linear.bias is None else linear.bias.data
    return QuantLinear(linear.weight.data, bias, site)
