"""Matrices into a model: swapped linears, an untied head, bare norms, and the merge.

    RMSNorm(x) = x / rms(x) * gamma          W <- W diag(gamma) for every reader,   gamma <- 1
    LayerNorm(x) = (x - mean x) / std x * gamma + b                                 b <- b / gamma

rms(x R) = rms(x), but diag(gamma) does not commute with R, so gamma moves into whatever reads a
norm of the residual stream: q, k, v or a router, gate and up, the head. Their biases stay. Norms
within a branch, as those of queries and keys, are left alone. The embedding mean is *not*
subtracted: RMSNorm, unlike LayerNorm, sees it. Source: QuaRot (arXiv 2404.00456) section 4; it
makes RMSNorms of LayerNorms, where here a rotation under LayerNorm leaves the mean alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.codecs.fold import fold
from harness.codecs.placement import HEAD_SITE
from harness.config.errors import ConfigError
from harness.models.adapter import Adapter
from harness.models.attention import attach
from harness.models.experts import swap_experts
from harness.models.quant_linear import QuantLinear, SiteInput
from harness.models.source import untie
from harness.transforms import Chain, Codec, Placement, Role


def swap(adapter: Adapter) -> None:
    """Put a QuantLinear with the same weight in place of every linear of the blocks.

    Nothing is computed differently. What is swapped already, in a model from a checkpoint, stays as
    it is.
    """
    for index, block in enumerate(adapter.blocks):
        for name, parameters in _experts(adapter, index).items():
            module = block.get_submodule(name)
            if parameters[0] in module._parameters:
                swap_experts(adapter.decoder, module, parameters)
        for site in adapter.sites(index):
            linears = {
                name: linear
                for name, linear in adapter.linears(index, site).items()
                if not isinstance(linear, QuantLinear)
            }
            # one for all of them, so that what they read is encoded and quantized once
            shared = SiteInput(len(linears))
            turned = {matrix.name for matrix in site.matrices if matrix.reads == 0}
            if turned and adapter.offloaded is not None:
                raise ConfigError(
                    f"model.weights=disk with a {adapter.structure.architecture}: its files hold "
                    "linears the other way round; set model.weights=memory."
                )
            for name, linear in linears.items():
                block.set_submodule(name, _quant_linear(linear, shared, name in turned))


def _experts(adapter: Adapter, index: int) -> dict[str, list[str]]:
    """{block-relative module: its parameters} of a block's routed experts."""
    found: dict[str, list[str]] = {}
    for site in adapter.structure.sites[index]:
        for matrix in site.matrices:
            if site.experts:
                module, _, parameter = matrix.name.rpartition(".")
                found.setdefault(module, []).append(parameter)
    return found


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
    fused = adapter.structure.residual.fused
    for layer, roles in _by_layer(adapter):
        with adapter.open(layer, write=True):
            for name, role in roles.items():
                if role.kind == "norm" and name in fused:
                    norm = adapter.model.get_submodule(name)
                    gamma = norm.weight.detach().double() + (role.gain == "1+w")
                    gains[role.layer, role.writes] = gamma
                    for parameter, axis in fused[name]:
                        for weight in adapter.weights(parameter, axis):
                            weight.copy_(weight.double() * gamma)
                    norm.weight.fill_(role.gain == "w")
                    if getattr(norm, "bias", None) is not None:
                        norm.bias.copy_(norm.bias.double() / gamma)
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
        if role.kind != "linear" or not role.swapped:
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


def _quant_linear(linear: nn.Module, site: SiteInput, turned: bool = False) -> QuantLinear:
    """The same matrix product; turned: its weight stands there as [in, out]."""
    weight = linear.get_parameter("weight").data
    if turned:
        weight = weight.T.contiguous()
    bias = getattr(linear, "bias", None)
    return QuantLinear(weight, None if bias is None else bias.data, site)
