"""adacodec: a trained encoder before the activation quantizer and a trained decoder behind it, absorbed by the weights.

    X^ = Q(X R1) R2,     Y = X^ W^T = Q(X R1) (W R2^T)^T          R1, R2 block-diagonal, orthogonal, R2 = R1^T at the start

placement stream: one R1 for the residual stream, with an independent copy, all starting at R1, in each of the five linears
that read it (their decoders) and the two that write it; per layer an encoder on v with a decoder in o, and an encoder on down's
input, the only online one, with a decoder in down. What is quantized at a norm is Q(h R1 diag(gamma)) if R1 starts at identity
(ours: merely fusing gamma into W costs NVFP4 more than a codec wins back). site: an online encoder a site, a decoder a linear.
After training R1 R2 != I: the float model has changed too. So no gate holds here; the perplexity of the float codec model is
reported instead, on every corpus, and a gain there is adaptation to the training text.

objective: lm (as published), kd (distillation, ours), layer (relative output error, site by site; ours; placement site).
decoder: free | tied (R2 = R1^T: a learned rotation, and the function stays) | ridge (R1 as it starts, the least-squares D of X
from Q(X R1) in closed form, so that objective, steps and lr mean nothing; placement site). placement merged: stream without the
codec of down's input, so that nothing stays online.
Source: AdaCodec's code, on SpinQuant's trainer (preset adacodec_paper). Differences: grouped queries and biases work, no
embedding mean is subtracted, the loop quantizes what the evaluation does (with scales of each tensor where those are
calibrated), o reads the decoder of v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.codecs.codec import Blocks, Diagonal
from harness.codecs.placement import Placement, Role
from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.linalg.hadamard import Hadamard, random_signs, reachable
from harness.linalg.stiefel import deviation
from harness.transforms.base import CalibrationModel, ModelShape, Transform, generator
from harness.transforms.block_diagonal import BLOCKS, common_blocks
from harness.transforms.layerwise import Ridge, reconstruct
from harness.transforms.learn import Descent, end_to_end
from harness.transforms.pca import principal_axes
from harness.transforms.sampling import Covariance

FLOOR = 1e-5  # least magnitude of a norm weight that is divided by


class AdaCodec(Transform):
    """placement: stream | merged | site. objective: lm | kd | layer. decoder: free | tied | ridge. init: hadamard | identity |
    pca. block_size: auto (the largest of 128, 64, 32, 16 that divides every width; a head caps that of values) or a number.
    The rest: learn.Descent, for `layer` with rows in place of windows (512 a window)."""

    learned = True
    sees = ("act",)  # as published: learned with a float KV cache, whatever it is evaluated with

    def __init__(
        self,
        placement: str,
        objective: str,
        decoder: str,
        init: str,
        steps: int,
        batch: int,
        lr: float,
        max_angle: float | None = None,
        optimizer: str = "cayley",
        cap: str = "tensor",
        block_size: int | str = "auto",
    ):
        self.place = one_of("transform.placement", placement, ("stream", "merged", "site"))
        self.objective = one_of("transform.objective", objective, ("lm", "kd", "layer"))
        self.decoder = one_of("transform.decoder", decoder, ("free", "tied", "ridge"))
        self.init = one_of("transform.init", init, ("hadamard", "identity", "pca"))
        self.descent = Descent(steps, batch, lr, optimizer, max_angle, cap)
        self.block_size = block_size
        for field, value, only in (
            ("objective", objective, "layer"),
            ("decoder", decoder, "ridge"),
        ):
            if value == only and placement != "site":
                raise ConfigError(
                    f"transform.{field}={only} with transform.placement={placement}: it works site by site, and "
                    "the stream's encoder is shared by all; set transform.placement=site."
                )
        self.exact = decoder == "tied"
        self.free_decoder = decoder != "tied"
        self.residual = placement != "site"
        if decoder == "ridge":  # solved for, not learned
            self.unread = ("objective", "steps", "batch", "lr", "optimizer", "max_angle", "cap")

    @property
    def structure(self) -> dict[str, object]:
        return {"placement": self.place, "decoder": self.decoder}

    def leaves(self, context: ModelShape) -> tuple[str, ...]:
        return tuple(f"an encoder at {site}" for site in self.encodes(context))

    def encodes(self, context: ModelShape) -> tuple[str, ...]:
        return {"site": tuple(context.widths), "stream": ("down_in",), "merged": ()}[self.place]

    def check(self, context: ModelShape) -> list[str]:
        if context.scheme.act is None:
            raise ConfigError(
                f"format.act.bits=16 with transform={self.name}: no activation is quantized, so there is nothing "
                "to encode; set format.act.bits=4, or use another transform."
            )
        blocks = {self._block(context), self._value_block(context)}
        for g in blocks if self.init == "hadamard" else ():
            reachable("transform.init=hadamard", g, "transform.init=identity")
        return []

    def _block(self, context: ModelShape) -> int:
        """g, for everything but values."""
        outside = {"site": (), "stream": ("o_in",), "merged": ("o_in", "down_in")}[self.place]
        widths = {site: width for site, width in context.widths.items() if site not in outside}
        fits = [
            g
            for g in common_blocks(widths)
            if self.place == "site" or not context.head_dim % min(g, context.head_dim)
        ]
        if self.block_size == "auto" and fits:
            return fits[0]
        if (
            not isinstance(self.block_size, int)
            or isinstance(self.block_size, bool)
            or self.block_size < 2
        ):
            raise ConfigError(
                f"transform.block_size={self.block_size}: needs auto (where one of {BLOCKS} divides "
                f"{dict(widths)} and the head, {context.head_dim}), or a number that does."
            )
        for site, width in widths.items():
            if width % self.block_size:
                raise ConfigError(
                    f"transform.block_size={self.block_size} does not divide site {site} ({width} features); "
                    f"sizes that divide every site: {', '.join(map(str, fits)) or 'none of ' + str(BLOCKS)}."
                )
        return self.block_size

    def _value_block(self, context: ModelShape) -> int:
        g = min(self._block(context), context.head_dim)
        if self.place != "site" and context.head_dim % g:
            raise ConfigError(
                f"transform.block_size={g} does not divide head_dim {context.head_dim}, as the values' codec "
                "must; take a divisor of it."
            )
        return g

    def fit(self, context: ModelShape, subject: CalibrationModel) -> Placement:
        start = self.start(context, subject)
        notes = {
            "placement": self.place,
            "block_size": self._block(context),
            "decoder": self.decoder,
            "init": self.init,
        }
        if self.decoder == "ridge":
            return self._ridge(context, subject, start, notes)
        if self.objective == "layer":
            learned, more = reconstruct(subject, context, start, self.descent)
        else:
            scheme, build = context.scheme.seen("act"), partial(self.build, context, subject)
            learned, more = end_to_end(subject, scheme, start, build, self.descent, self.objective)
        notes |= more | {
            "orthogonality": max(deviation(m) for m in learned.values()),
            "codec_gap": _gap(start, learned),
        }
        return replace(self.build(context, subject, learned), notes=notes)

    def start(self, context: ModelShape, subject: CalibrationModel) -> dict[str, Tensor]:
        """All matrices to begin with, float64; decoders (named with ^) equal their encoders' transposes."""
        encoders = self._encoders(context, subject)
        if self.decoder != "free":
            return encoders
        return self._copies(
            encoders, [r for r in subject.roles.values() if r.layer == 0 and r.kind == "linear"]
        )

    def build(
        self, context: ModelShape, subject: CalibrationModel, matrices: Mapping[str, Tensor]
    ) -> Placement:
        """Where such matrices go."""
        linears = [
            [r for r in subject.roles.values() if r.layer == i and r.kind == "linear"]
            for i in range(context.layers)
        ]
        return (
            self._sites(matrices, linears)
            if self.place == "site"
            else self._stream(subject, matrices, linears)
        )

    def _encoders(self, context: ModelShape, subject: CalibrationModel) -> dict[str, Tensor]:
        """The encoders to begin with: stream {R1 [nb, g, g], R2 and RM [L, nb, g, g]}, site {site: [L, nb, g, g]}."""
        g, gv = self._block(context), self._value_block(context)
        if self.place != "site":
            shapes = {"R1": (g, ["attn_in", "mlp_in"]), "R2": (gv, ["o_in"])}
            shapes |= {"RM": (g, ["down_in"])} if self.place == "stream" else {}
        else:
            shapes = {site: (g, [site]) for site in context.widths}
        if self.init == "pca":
            return self._principal(context, subject, shapes)
        start = {}
        for name, (size, sites) in shapes.items():
            width = (
                context.kv_heads * context.head_dim if name == "R2" else context.widths[sites[0]]
            )
            one = torch.eye(size, dtype=torch.float64)
            if self.init == "hadamard":
                one = Hadamard(
                    size, random_signs(size, generator(context.seed, "adacodec", size))
                ).dense()
            start[name] = one.expand(
                *(() if name == "R1" else (context.layers,)), width // size, size, size
            ).clone()
        return start

    def _principal(
        self, context: ModelShape, subject: CalibrationModel, shapes: Mapping
    ) -> dict[str, Tensor]:
        size = {site: size for size, sites in shapes.values() for site in sites}
        found = subject.observe(
            lambda layer, site, n: Covariance(size[site], False, lambda c: c),
            size,
            "principal axes",
        )
        start = {}
        for name, (g, sites) in shapes.items():
            c = torch.stack(
                [
                    torch.stack([found[i, site] for site in sites]).mean(0)
                    for i in range(context.layers)
                ]
            )
            if name == "R2":  # the query heads of one key/value head read the same values
                per_head = c.unflatten(1, (context.kv_heads, -1, context.head_dim // g))
                c = per_head.mean(2).flatten(1, 2)
            start[name] = principal_axes(c.mean(0) if name == "R1" else c).cpu()
        return start

    def _copies(self, start: Mapping[str, Tensor], linears: list[Role]) -> dict[str, Tensor]:
        """Every decoder as a matrix of its own, beginning where its encoder begins."""
        if self.place == "site":
            count = {site: sum(r.reads == site for r in linears) for site in start}
            copies = {
                f"{site}^": e[:, None].expand(-1, count[site], *e.shape[1:]).clone()
                for site, e in start.items()
            }
        else:
            count = sum(r.reads_residual or r.writes == "residual" for r in linears)
            copies = {
                "R1^": start["R1"].expand(len(start["R2"]), count, *start["R1"].shape).clone()
            }
            copies |= {f"{name}^": start[name].clone() for name in ("R2", "RM") if name in start}
        return {**start, **copies}

    def _stream(
        self, subject: CalibrationModel, matrices: Mapping[str, Tensor], linears: list[list[Role]]
    ) -> Placement:
        free, shared = "R1^" in matrices, matrices["R1"]
        encoders, decoders, merged, online = {}, {}, {}, {}
        # unbound at once: a gradient of single slices would be a tensor of all layers, thirty times over
        copies = matrices["R1^"].unbind(0) if free else [None] * len(linears)
        for name, places, site in (("R2", merged, "o_in"), ("RM", online, "down_in")):
            hats = (
                matrices[f"{name}^"].mT.unbind(0)
                if f"{name}^" in matrices
                else [None] * len(linears)
            )
            for i, (encoder, hat) in enumerate(
                zip(matrices[name].unbind(0) if name in matrices else (), hats)
            ):
                places[i, site] = Blocks(encoder, hat)
        for i in range(len(linears)):
            sites = {r.reads for r in linears[i] if r.reads_residual}
            scales = {
                site: s.to(shared)
                for site in sites
                if (s := self._scale(subject, i, site)) is not None
            }
            merged |= {(i, site): Diagonal(s) for site, s in scales.items()}
            touching = [r for r in linears[i] if r.reads_residual or r.writes == "residual"]
            for role, copy in zip(
                touching, copies[i].unbind(0) if free else [shared] * len(touching)
            ):
                if not role.reads_residual:
                    encoders[i, role.name] = Blocks(copy)
                elif role.reads in scales:
                    decoders[i, role.name] = Blocks(
                        None, scales[role.reads].view(len(copy), -1, 1) * copy.mT
                    )
                else:
                    decoders[i, role.name] = Blocks(copy)
        return Placement(Blocks(shared), merged, online, None, encoders, decoders)

    def _scale(self, subject: CalibrationModel, layer: int, site: str) -> Tensor | None:
        """s with Q(h R1 diag(1 / s)): 1 / gamma from identity, so that learning starts at the very model and not at one whose
        fused norms have changed what is quantized. In another basis gamma means nothing."""
        gain = subject.gains.get((layer, site)) if self.init == "identity" else None
        return None if gain is None else 1 / torch.copysign(gain.abs().clamp_min(FLOOR), gain)

    @staticmethod
    def _sites(matrices: Mapping[str, Tensor], linears: list[list[Role]]) -> Placement:
        online, decoders = {}, {}
        for site in (name for name in matrices if not name.endswith("^")):
            copies = (
                matrices[f"{site}^"].unbind(0) if f"{site}^" in matrices else [()] * len(linears)
            )
            for i, encoder in enumerate(matrices[site].unbind(0)):
                online[i, site] = Blocks(encoder)
                for role, copy in zip([r for r in linears[i] if r.reads == site], copies[i]):
                    decoders[i, role.name] = Blocks(copy)
        return Placement(online=online, decoders=decoders)

    def _ridge(
        self,
        context: ModelShape,
        subject: CalibrationModel,
        start: Mapping[str, Tensor],
        notes: dict,
    ) -> Placement:
        def collector(i, site, n):
            return Ridge(Blocks(start[site][i]), context.reads(site, i))

        found = subject.observe(collector, start, "ridge decoders")
        online = {where: Blocks(start[where[1]][where[0]], d) for where, (d, _) in found.items()}
        error = sum(e for _, e in found.values()) / len(found)
        return Placement(online=online, notes={**notes, "ridge_error": error})


def _gap(start: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> float:
    """The largest entry of |R1 R2 - I| over all pairs of an encoder and its decoder."""
    gaps = [0.0]
    for name in (n for n in start if f"{n}^" in learned):
        encoder, copies = learned[name], learned[f"{name}^"]
        encoder = encoder if name == "R1" or copies.ndim == encoder.ndim else encoder[:, None]
        product = encoder @ copies.mT
        gaps.append(
            float((product - torch.eye(product.shape[-1], dtype=product.dtype)).abs().max())
        )
    return max(gaps)
