"""What the matrices of adacodec begin as: equal blocks or principal axes, and copies of them.

Matrices are named as adacodec.start has them: encoders R1, R2, RM or sites, free decoders with ^. A
decoder begins as a copy of its encoder, since what decodes is the transpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.codecs.placement import Role
from harness.linalg.hadamard import Hadamard, random_signs
from harness.transforms.base import ModelShape, generator
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.codec_places import on_stream
from harness.transforms.pca import principal_axes
from harness.transforms.sampling import Covariance

# {encoder: (the order of its blocks, the sites whose activations it is for)}
Encoded = Mapping[str, tuple[int, Sequence[str]]]


def alike(shape: ModelShape, encoded: Encoded, init: str) -> dict[str, Tensor]:
    """Encoders whose blocks are all alike; init: hadamard | identity."""
    start = {}
    for name, (g, sites) in encoded.items():
        width = shape.widths[sites[0]]
        if name == "R2":
            width = shape.kv_heads * shape.head_dim
        block = torch.eye(g, dtype=torch.float64)
        if init == "hadamard":
            signs = random_signs(g, generator(shape.seed, "adacodec", g))
            block = Hadamard(g, signs).dense()
        layers = () if name == "R1" else (shape.layers,)
        start[name] = block.expand(*layers, width // g, g, g).clone()
    return start


def principal(shape: ModelShape, model: CalibrationModel, encoded: Encoded) -> dict[str, Tensor]:
    """Encoders along the principal axes of what they encode."""
    orders = {site: g for g, sites in encoded.values() for site in sites}
    covariances = model.observe(
        lambda layer, site, width: Covariance(orders[site], center=False),
        orders,
        "principal axes",
    )
    start = {}
    for name, (g, sites) in encoded.items():
        layers = [
            torch.stack([covariances[layer, site] for site in sites]).mean(0)
            for layer in range(shape.layers)
        ]
        c = torch.stack(layers)
        if name == "R1":  # one for all layers
            c = c.mean(0)
        if name == "R2":  # the query heads of one key/value head read the same values
            per_head = c.unflatten(1, (shape.kv_heads, -1, shape.head_dim // g))
            c = per_head.mean(2).flatten(1, 2)
        start[name] = principal_axes(c).cpu()
    return start


def copies_at_sites(encoders: Mapping[str, Tensor], linears: Sequence[Role]) -> dict[str, Tensor]:
    """A decoder for each of a block's linears that read a site, in every layer."""
    counts = {site: sum(role.reads == site for role in linears) for site in encoders}
    return {
        f"{site}^": e[:, None].expand(-1, counts[site], *e.shape[1:]).clone()
        for site, e in encoders.items()
    }


def copies_along_stream(
    encoders: Mapping[str, Tensor], linears: Sequence[Role]
) -> dict[str, Tensor]:
    """In every layer a decoder for each of a block's linears on the stream, and one for R2 and RM
    each."""
    layers = len(encoders["R2"])
    r1 = encoders["R1"]
    copies = {"R1^": r1.expand(layers, sum(map(on_stream, linears)), *r1.shape).clone()}
    copies |= {f"{name}^": e.clone() for name, e in encoders.items() if name != "R1"}
    return copies
