"""adacodec: a trained encoder before the activation quantizer, and a trained decoder behind it.

    X^ = Q(X R1) R2,     Y = X^ W^T = Q(X R1) (W R2^T)^T

R1, R2 are block-diagonal and orthogonal, R2 = R1^T at the start; the weights absorb the decoder.

placement   stream   one R1 for the residual stream, with an independent copy, all starting at R1,
                     in each of the five linears that read it (their decoders) and the two that
                     write it; per layer an encoder on v with a decoder in o, and an encoder on
                     down's input, the only online one, with a decoder in down. What is quantized at
                     a norm is Q(h R1 diag(gamma)) if R1 starts at identity (ours: merely fusing
                     gamma into W costs NVFP4 more than a codec wins back)
            merged   stream without the codec of down's input, so that nothing stays online
            site     an online encoder a site, a decoder a linear
objective   lm (as published) | kd (distillation, ours) | layer (relative output error, site by
            site; ours; placement site)
decoder     free | tied (R2 = R1^T: a learned rotation, and the function stays) | ridge (R1 as it
            starts, the least-squares D of X from Q(X R1) in closed form, so that objective, steps
            and lr mean nothing; placement site)

After training R1 R2 != I: the float model has changed too. So no gate holds here; the perplexity of
the float codec model is reported instead, on every corpus, and a gain there is adaptation to the
training text.

Source: AdaCodec's code, on SpinQuant's trainer (preset adacodec_paper). Differences: grouped
queries and biases work, no embedding mean is subtracted, the loop quantizes what the evaluation
does (with scales of each tensor where those are calibrated), o reads the decoder of v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.codecs.placement import Placement
from harness.config.checks import one_of
from harness.config.errors import ConfigError
from harness.linalg.hadamard import reachable
from harness.linalg.stiefel import deviation
from harness.transforms import codec_starts
from harness.transforms.base import ModelShape, Transform
from harness.transforms.block_diagonal import BLOCKS, alternatives, common_blocks
from harness.transforms.calibration_model import CalibrationModel
from harness.transforms.codec_places import along_stream, at_sites, gap, linears_of
from harness.transforms.layerwise import reconstruct, ridge
from harness.transforms.learn import Descent, end_to_end

FLOOR = 1e-5  # least magnitude of a norm weight that is divided by
# sites whose codec, if they have one, does not take its block size from all the others
APART = {"site": (), "stream": ("o_in",), "merged": ("o_in", "down_in")}


class AdaCodec(Transform):
    """placement: stream | merged | site. objective: lm | kd | layer. decoder: free | tied | ridge.
    init: hadamard | identity | pca. block_size: auto (the largest of 128, 64, 32, 16 that divides
    every width; a head caps that of values) or a number. The rest: learn.Descent, for `layer` with
    rows in place of windows (512 a window)."""

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
        for field, value, sitewise in (
            ("objective", objective, "layer"),
            ("decoder", decoder, "ridge"),
        ):
            if value == sitewise and placement != "site":
                raise ConfigError(
                    f"transform.{field}={value} with transform.placement={placement}: it works "
                    "site by site, and the stream's encoder is shared by all; "
                    "set transform.placement=site."
                )
        # R2 = R1^T leaves the float model as it was, and its inputs what the weights are for
        self.exact = decoder == "tied"
        self.free_decoder = decoder != "tied"
        # R1 lies on the stream, which the embedding and every norm meet
        self.residual = placement != "site"
        if decoder == "ridge":  # solved for, not learned
            self.unread = ("objective", "steps", "batch", "lr", "optimizer", "max_angle", "cap")

    @property
    def structure(self) -> dict[str, object]:
        return {"placement": self.place, "decoder": self.decoder}

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"an encoder at {site}" for site in self.encodes(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return {"site": tuple(shape.widths), "stream": ("down_in",), "merged": ()}[self.place]

    def check(self, shape: ModelShape) -> list[str]:
        if shape.scheme.act is None:
            raise ConfigError(
                f"format.act.bits=16 with transform={self.name}: no activation is quantized, so "
                "there is nothing to encode; set format.act.bits=4, or use another transform."
            )
        self._refuse_blocks(shape)
        sizes = {self._block(shape), self._value_block(shape)}
        if self.init == "hadamard":
            for g in sizes:
                reachable("transform.init=hadamard", g, "transform.init=identity")
        return []

    def _refuse_blocks(self, shape: ModelShape) -> None:
        """Refuse encoders of one size where blocks have several, and one encoder of the stream
        where blocks are not all attention and a plain MLP."""
        varied = [site for site in shape.widths if None not in shape.widths_of(site)]
        if varied:
            raise ConfigError(
                f"transform={self.name}: {', '.join(varied)} of this model have other widths in "
                "other blocks, and all blocks share one size of encoders; use transform=hadamard."
            )
        apart = set(shape.widths) != {"attn_in", "o_in", "mlp_in", "down_in"}
        if self.place != "site" and (apart or len(shape.turns) < shape.layers):
            raise ConfigError(
                f"transform.placement={self.place} with transform={self.name}: the blocks of this "
                f"model differ, or have more sites than four ({', '.join(shape.widths)}); "
                "set transform.placement=site transform.objective=layer."
            )

    def _block(self, shape: ModelShape) -> int:
        """g, for everything but values."""
        size = self.block_size
        widths = {s: width for s, width in shape.widths.items() if s not in APART[self.place]}
        blocks = common_blocks(widths)
        if self.place != "site":  # a block of values is no larger than a head, and divides it
            blocks = [g for g in blocks if shape.head_dim % min(g, shape.head_dim) == 0]
        if size == "auto" and blocks:
            return blocks[0]
        if not isinstance(size, int) or isinstance(size, bool) or size < 2:
            raise ConfigError(
                f"transform.block_size={size}: needs auto (where one of {BLOCKS} divides "
                f"{dict(widths)} and the head, {shape.head_dim}), or a number that does."
            )
        for site, width in widths.items():
            if width % size:
                raise ConfigError(
                    f"transform.block_size={size} does not divide site {site} "
                    f"({width} features); {alternatives(blocks)}"
                )
        return size

    def _value_block(self, shape: ModelShape) -> int:
        g = min(self._block(shape), shape.head_dim)
        if self.place != "site" and shape.head_dim % g:
            raise ConfigError(
                f"transform.block_size={g} does not divide head_dim {shape.head_dim}, as the "
                "values' codec must; take a divisor of it."
            )
        return g

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        start = self.start(shape, model)
        notes = {
            "placement": self.place,
            "block_size": self._block(shape),
            "decoder": self.decoder,
            "init": self.init,
        }
        if self.decoder == "ridge":
            online, more = ridge(model, shape, start)
            return Placement(online=online, notes=notes | more)
        if self.objective == "layer":
            learned, more = reconstruct(model, shape, start, self.descent)
        else:
            scheme = shape.scheme.seen("act")
            build = partial(self.build, shape, model)
            learned, more = end_to_end(model, scheme, start, build, self.descent, self.objective)
        notes |= more
        notes["orthogonality"] = max(deviation(matrix) for matrix in learned.values())
        notes["codec_gap"] = gap(start, learned)
        return replace(self.build(shape, model, learned), notes=notes)

    def start(self, shape: ModelShape, model: CalibrationModel) -> dict[str, Tensor]:
        """All matrices to begin with, float64.

        Encoders: stream {R1 [nb, g, g], R2 and RM [L, nb, g, g]}, site {site: [L, nb, g, g]}. Free
        decoders are named as their encoders with ^, and begin as copies of them: what decodes is
        the transpose.
        """
        encoded = self._encoded(shape)
        if self.init == "pca":
            encoders = codec_starts.principal(shape, model, encoded)
        else:
            encoders = codec_starts.alike(shape, encoded, self.init)
        if self.decoder != "free":
            return encoders
        linears = linears_of(model, 0)  # all layers are alike
        if self.place == "site":
            return encoders | codec_starts.copies_at_sites(encoders, linears)
        return encoders | codec_starts.copies_along_stream(encoders, linears)

    def build(
        self, shape: ModelShape, model: CalibrationModel, matrices: Mapping[str, Tensor]
    ) -> Placement:
        """Where such matrices go."""
        linears = [linears_of(model, layer) for layer in range(shape.layers)]
        if self.place == "site":
            return at_sites(matrices, linears)
        return along_stream(matrices, linears, partial(self._scale, model))

    def _encoded(self, shape: ModelShape) -> codec_starts.Encoded:
        """The encoders that there are."""
        g = self._block(shape)
        if self.place == "site":
            return {site: (g, [site]) for site in shape.widths}
        encoded = {"R1": (g, ["attn_in", "mlp_in"]), "R2": (self._value_block(shape), ["o_in"])}
        if self.place == "stream":
            encoded["RM"] = (g, ["down_in"])
        return encoded

    def _scale(self, model: CalibrationModel, layer: int, site: str) -> Tensor | None:
        """s with Q(h R1 diag(1 / s)): 1 / gamma from identity, none from another basis.

        Learning so starts at the very model, and not at one whose fused norms have changed what is
        quantized. In another basis gamma means nothing.
        """
        gain = model.gains.get((layer, site))
        if gain is None or self.init != "identity":
            return None
        return 1 / torch.copysign(gain.abs().clamp_min(FLOOR), gain)
