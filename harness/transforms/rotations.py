"""The places of R1 .. R4, shared by quarot, spinquant, dartquant and jointquant.

    R1  [hidden, hidden]      the residual stream; merged into everything that writes or reads it
    R2  [head_dim, head_dim]  values, per layer or per key/value head; merged into v and o
    R3  [head_dim, head_dim]  queries and keys after RoPE; online, cancels in the scores; helps
                              quantized keys only
    R4  [inter., inter.]      the input of down; online, and merged into it; helps quantized
                              activations only

They differ in how they find R1 and R2. r3, r4: `auto` puts them where the quantizer they help is
on, `on` always; keys that are quantized by channel are not helped. r3=b: R3 = I (x) H_b, for keys
in blocks of b: an outlier is spread over its own block, and reaches no scale of another. All draws
are Hadamard, with random signs. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406);
blocks as in MR-GPTQ (arXiv 2509.23202), which takes them for activations and weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from harness.codecs.codec import Codec, Rotation
from harness.codecs.placement import Placement, Where
from harness.config.checks import boolean, integer
from harness.config.errors import ConfigError
from harness.formats import NVFP4
from harness.linalg.hadamard import Hadamard, random_signs, reachable
from harness.transforms.base import ModelShape, Transform, generator
from harness.transforms.calibration_model import CalibrationModel


class Rotations(Transform):
    """r2: whether values are rotated. r3, r4: auto | on | off; r3: or a block size, which is on.
    random_signs: false leaves the bare Hadamard matrices."""

    residual = True

    def __init__(
        self,
        r2: bool = True,
        r3: str | int | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        self.r2 = boolean("transform.r2", r2)
        self.random_signs = boolean("transform.random_signs", random_signs)
        block = isinstance(r3, int) and not isinstance(r3, bool)
        self.r3 = integer("transform.r3", r3) if block else switch("transform.r3", r3)
        self.r4 = switch("transform.r4", r4)

    @abstractmethod
    def matrices(
        self, shape: ModelShape, model: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        """R1, R2 of each layer (on kv_heads * head_dim features), and notes."""

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        r1, r2, notes = self.matrices(shape, model)
        return self.placement(shape, r1, r2, notes)

    def placement(
        self, shape: ModelShape, r1: Codec | None, r2: Mapping[int, Codec], notes: Mapping
    ) -> Placement:
        """R1 and R2 where they belong, with R3 and R4 where they help."""
        r3 = None
        if self.wants_r3(shape):
            r3 = self.draw(shape, self.r3_order(shape), "R3")
        online: dict[Where, Codec] = {}
        if self.wants_r4(shape):
            # None: one for all layers, but where their widths differ
            for layer, width in shape.widths_of("down_in").items():
                online[layer, "down_in"] = self.draw(shape, width, "R4")
        places = {"R1": r1, "R2": r2, "R3": r3, "R4": online}
        return Placement(
            residual=r1,
            merged={(layer, "o_in"): codec for layer, codec in r2.items()},
            online=online,
            query_key=r3,
            notes={"rotations": [name for name, place in places.items() if place], **notes},
        )

    def complete(self, shape: ModelShape, placement: Placement) -> Placement:
        # R3 and R4 are drawn anew: this run may want them where the stored one did not
        r2 = {layer: codec for (layer, _), codec in placement.merged.items() if layer is not None}
        notes = {name: note for name, note in placement.notes.items() if name != "rotations"}
        return self.placement(shape, placement.residual, r2, notes)

    @property
    def structure(self) -> dict[str, object]:
        return {"R1": self.residual, "R2": self.r2}

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        online = {
            "R3 (transform.r3=off)": self.wants_r3(shape),
            "R4 (transform.r4=off)": self.wants_r4(shape),
        }
        return tuple(name for name, on in online.items() if on)

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return ("down_in",) if self.wants_r4(shape) else ()

    def wants_r3(self, shape: ModelShape) -> bool:
        """Whether R3 is placed."""
        if self.r3 == "auto":
            kv = shape.scheme.kv
            return kv is not None and kv.key_axis == "token"
        return self.r3 != "off"

    def r3_order(self, shape: ModelShape) -> int:
        """Features that R3 mixes: those of a head's keys, or of a block of them."""
        return self.r3 if isinstance(self.r3, int) else shape.key_dim

    def wants_r4(self, shape: ModelShape) -> bool:
        """Whether R4 is placed."""
        there = "down_in" in shape.widths
        return self.r4 == "on" or (self.r4 == "auto" and there and shape.quantizes("down_in"))

    def draw(self, shape: ModelShape, n: int, *key: object) -> Rotation:
        """A randomized Hadamard matrix of order n, seeded by the run's seed and `key`."""
        signs = None
        if self.random_signs:
            # keyed by place, so that one matrix stays as it is whatever others are drawn
            signs = random_signs(n, generator(shape.seed, *key))
        return Rotation(Hadamard(n, signs))

    def check(self, shape: ModelShape) -> list[str]:
        if self.r2 or self.wants_r3(shape):
            self._refuse_heads(shape)
        if self.r2:
            reachable("transform.r2=true", shape.head_dim, "transform.r2=false")
        if self.wants_r3(shape):
            order = self.r3_order(shape)
            if shape.key_dim % order:
                raise ConfigError(
                    f"transform.r3={self.r3} does not divide the {shape.key_dim} features of a "
                    "head's keys; set transform.r3=on, or a size that does."
                )
            reachable(f"transform.r3={self.r3}", order, "transform.r3=off")
        if self.r4 == "on" and "down_in" not in shape.widths:
            raise ConfigError(
                f"transform.r4={self.r4}: no site of this model is a down_in, so R4 has no place; "
                "set transform.r4=off."
            )
        if self.wants_r4(shape):
            for width in shape.widths_of("down_in").values():
                reachable(f"transform.r4={self.r4}", width, "transform.r4=off")
        if any(isinstance(part, NVFP4) for part in (shape.scheme.weight, shape.scheme.act)):
            return [
                "a rotated residual stream with NVFP4: blocks of 16 isolate outliers better than "
                "a rotation spreads them"
            ]
        return []

    def _refuse_heads(self, shape: ModelShape) -> None:
        """Refuse R2 and R3 where there are no heads, or no one size of them."""
        if shape.structure is None:
            return
        attention = shape.structure.attention
        sizes = {each.features for each in attention.values()}
        if self.r2 and not shape.turns:
            raise ConfigError(
                "transform.r2=true: no block's values come from a matrix that a rotation could be "
                "merged into; set transform.r2=false."
            )
        unmet = shape.structure.unmet
        if self.wants_r3(shape) and unmet is not None:
            raise ConfigError(
                f"transform.r3={self.r3}: nothing can be put before attention, for {unmet}; set "
                "transform.r3=off."
            )
        if len(sizes) > 1:
            raise ConfigError(
                f"transform.r2={self.r2}, transform.r3={self.r3}: heads have {len(sizes)} sizes in "
                "this model; set transform.r2=false transform.r3=off."
            )

    def needs_activations(self, shape: ModelShape) -> None:
        """Refuse to learn what no quantizer can see."""
        kv = shape.scheme.kv
        # R1 cancels in all that reads the stream in float
        sees_r1 = shape.quantizes("attn_in") or shape.quantizes("mlp_in")
        if self.residual and not sees_r1 and kv is not None and not self.r2:
            raise ConfigError(
                f"format.act.bits=16 with format.kv.bits={kv.bits} and no R2 in "
                f"transform={self.name}: keys and values do not see R1, so there is nothing to "
                "learn; learn R2 as well, or set format.act.bits=4."
            )
        if not sees_r1 and not shape.quantizes("o_in") and kv is None:
            raise ConfigError(
                f"format.act.bits=16 and format.kv.bits=16 with transform={self.name}: the model "
                "is invariant under its rotations until an activation is quantized, so there is "
                "nothing to learn; set format.act.bits=4, or use transform=quarot."
            )


def switch(field: str, value: str | int | bool) -> str:
    """auto | on | off; YAML reads a bare on or off as a truth value."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value not in ("auto", "on", "off"):
        raise ConfigError(f"{field}={value}: choose one of auto, on, off.")
    return str(value)
