"""Where the matrices of adacodec go: along the residual stream, or site by site.

Matrices are named as adacodec.start has them: encoders R1, R2, RM or sites, free decoders with ^.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Codec, Diagonal
from harness.codecs.placement import Placement, Role, Where
from harness.transforms.calibration_model import CalibrationModel


def linears_of(model: CalibrationModel, layer: int) -> list[Role]:
    """The linears of a block."""
    return [r for r in model.roles.values() if r.layer == layer and r.kind == "linear"]


def on_stream(role: Role) -> bool:
    """Whether a linear reads or writes the residual stream."""
    return role.reads_residual or role.writes == "residual"


def along_stream(
    matrices: Mapping[str, Tensor],
    linears: Sequence[Sequence[Role]],
    scale: Callable[[int, str], Tensor | None],
) -> Placement:
    """R1 on the stream, R2 on the values, RM, if there is one, before down.

    linears: of each layer. scale: (layer, site) -> s [n] by which the stream is divided there, if
    it is.
    """
    shared = matrices["R1"]
    merged = _pairs(matrices, "R2", "o_in")
    encoders: dict[Where, Codec] = {}
    decoders: dict[Where, Codec] = {}
    # unbound at once: a gradient of single slices would be a tensor of all layers, thirty times
    copies: Sequence[Tensor | None] = [None] * len(linears)
    if "R1^" in matrices:
        copies = matrices["R1^"].unbind(0)
    for layer, (roles, free) in enumerate(zip(linears, copies)):
        scales = {}
        # q, k and v read one site, as gate and up do: one scale for all of them
        norms = [role.reads for role in roles if role.reads_residual and role.reads]
        for site in dict.fromkeys(norms):
            s = scale(layer, site)
            if s is not None:
                scales[site] = s.to(shared)
                merged[layer, site] = Diagonal(scales[site])
        touching = [role for role in roles if on_stream(role)]
        ends = [shared] * len(touching) if free is None else free.unbind(0)
        for role, copy in zip(touching, ends):
            where = (layer, role.name)
            if not role.reads_residual:
                encoders[where] = Blocks(copy)
            elif role.reads in scales:
                # the decoder undoes the scale, too: in place of R1^T, diag(s) R^T
                decoder = scales[role.reads].view(len(copy), -1, 1) * copy.mT
                decoders[where] = Blocks(None, decoder)
            else:
                decoders[where] = Blocks(copy)
    online = _pairs(matrices, "RM", "down_in")
    return Placement(Blocks(shared), merged, online, None, encoders, decoders)


def at_sites(matrices: Mapping[str, Tensor], linears: Sequence[Sequence[Role]]) -> Placement:
    """An online encoder a site, a decoder a linear where decoders are free."""
    online: dict[Where, Codec] = {}
    decoders: dict[Where, Codec] = {}
    for site in (name for name in matrices if not name.endswith("^")):
        for layer, encoder in enumerate(matrices[site].unbind(0)):
            online[layer, site] = Blocks(encoder)
        if f"{site}^" in matrices:
            for layer, copies in enumerate(matrices[f"{site}^"].unbind(0)):
                readers = [role for role in linears[layer] if role.reads == site]
                for role, copy in zip(readers, copies.unbind(0)):
                    decoders[layer, role.name] = Blocks(copy)
    return Placement(online=online, decoders=decoders)


def gap(start: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> float:
    """The largest entry of |R1 R2 - I| over all pairs of an encoder and its decoder."""
    gaps = [0.0]
    for name in (n for n in start if f"{n}^" in learned):
        encoder = learned[name]
        copies = learned[f"{name}^"]
        if name != "R1" and copies.ndim > encoder.ndim:  # a decoder a linear of the layer
            encoder = encoder[:, None]
        product = encoder @ copies.mT
        eye = torch.eye(product.shape[-1], dtype=product.dtype)
        gaps.append(float((product - eye).abs().max()))
    return max(gaps)


def _pairs(matrices: Mapping[str, Tensor], name: str, site: str) -> dict[Where, Codec]:
    """Encoder and decoder of every layer at a site; none where there is no such encoder."""
    if name not in matrices:
        return {}
    encoders = matrices[name].unbind(0)
    decoders: Sequence[Tensor | None] = [None] * len(encoders)
    if f"{name}^" in matrices:
        decoders = matrices[f"{name}^"].mT.unbind(0)
    return {
        (layer, site): Blocks(encoder, decoder)
        for layer, (encoder, decoder) in enumerate(zip(encoders, decoders))
    }
