"""The places of R1 .. R4, shared by quarot, spinquant, dartquant and jointquant, which differ in how they find R1 and R2.

    R1  [hidden, hidden]     the residual stream; merged into everything that writes or reads it
    R2  [head_dim, head_dim] values, per layer or per key/value head; merged into v and o
    R3  [head_dim, head_dim] queries and keys after RoPE; online, cancels in the scores; helps quantized keys only
    R4  [inter., inter.]     the input of down; online, and merged into it; helps quantized activations only

r3, r4: `auto` puts them where the quantizer they help is on, `on` always. All draws are Hadamard, with random signs.
Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from harness.codecs.codec import Codec, Rotation
from harness.codecs.placement import Placement
from harness.config.checks import boolean
from harness.config.errors import ConfigError
from harness.formats import NVFP4
from harness.linalg.hadamard import Hadamard, random_signs, reachable
from harness.transforms.base import CalibrationModel, ModelShape, Transform, generator


class Rotations(Transform):
    """r2: whether values are rotated. r3, r4: auto | on | off. random_signs: false leaves the bare Hadamard matrices."""

    residual = True

    def __init__(
        self,
        r2: bool = True,
        r3: str | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        self.r2, self.random_signs = (
            boolean("transform.r2", r2),
            boolean("transform.random_signs", random_signs),
        )
        self.r3, self.r4 = switch("transform.r3", r3), switch("transform.r4", r4)

    @abstractmethod
    def matrices(
        self, context: ModelShape, subject: CalibrationModel
    ) -> tuple[Codec | None, Mapping[int, Codec], dict]:
        """R1, R2 of each layer (on kv_heads * head_dim features), and notes."""

    def fit(self, context: ModelShape, subject: CalibrationModel) -> Placement:
        r1, r2, notes = self.matrices(context, subject)
        return self.placement(context, r1, r2, notes)

    def placement(
        self, context: ModelShape, r1: Codec | None, r2: Mapping[int, Codec], notes: Mapping
    ) -> Placement:
        """R1 and R2 where they belong, with R3 and R4 where they help."""
        r3, r4 = self.wants_r3(context), self.wants_r4(context)
        return Placement(
            residual=r1,
            merged={(layer, "o_in"): codec for layer, codec in r2.items()},
            online={(None, "down_in"): self.draw(context, context.widths["down_in"], "R4")}
            if r4
            else {},
            query_key=self.draw(context, context.head_dim, "R3") if r3 else None,
            notes={
                "rotations": [
                    n for n, on in (("R1", r1), ("R2", r2), ("R3", r3), ("R4", r4)) if on
                ],
                **notes,
            },
        )

    def complete(self, context: ModelShape, placement: Placement) -> Placement:
        r2 = {layer: codec for (layer, _), codec in placement.merged.items()}
        notes = {name: note for name, note in placement.notes.items() if name != "rotations"}
        return self.placement(context, placement.residual, r2, notes)

    @property
    def structure(self) -> dict[str, object]:
        return {"R1": self.residual, "R2": self.r2}

    def leaves(self, context: ModelShape) -> tuple[str, ...]:
        online = (
            ("R3 (transform.r3=off)", self.wants_r3(context)),
            ("R4 (transform.r4=off)", self.wants_r4(context)),
        )
        return tuple(name for name, on in online if on)

    def encodes(self, context: ModelShape) -> tuple[str, ...]:
        return ("down_in",) if self.wants_r4(context) else ()

    def wants_r3(self, context: ModelShape) -> bool:
        """Whether R3 is placed."""
        return self.r3 == "on" or (self.r3 == "auto" and context.scheme.kv is not None)

    def wants_r4(self, context: ModelShape) -> bool:
        """Whether R4 is placed."""
        return self.r4 == "on" or (self.r4 == "auto" and context.quantizes("down_in"))

    def draw(self, context: ModelShape, n: int, *key: object) -> Rotation:
        """A randomized Hadamard matrix of order n, seeded by the run's seed and `key`."""
        signs = random_signs(n, generator(context.seed, *key)) if self.random_signs else None
        return Rotation(Hadamard(n, signs))

    def check(self, context: ModelShape) -> list[str]:
        if self.r2:
            reachable("transform.r2=true", context.head_dim, "transform.r2=false")
        if self.wants_r3(context):
            reachable(f"transform.r3={self.r3}", context.head_dim, "transform.r3=off")
        if self.wants_r4(context):
            reachable(f"transform.r4={self.r4}", context.widths["down_in"], "transform.r4=off")
        if any(isinstance(part, NVFP4) for part in (context.scheme.weight, context.scheme.act)):
            return [
                "a rotated residual stream with NVFP4: blocks of 16 isolate outliers better than a rotation spreads them"
            ]
        return []

    def needs_activations(self, context: ModelShape) -> None:
        """Refuse to learn what no quantizer can see."""
        sees_r1 = context.quantizes("attn_in") or context.quantizes("mlp_in")
        if self.residual and not sees_r1 and context.scheme.kv is not None and not self.r2:
            raise ConfigError(
                f"format.act.bits=16 with format.kv.bits={context.scheme.kv.bits} and no R2 in transform={self.name}: keys and "
                "values do not see R1, so there is nothing to learn; learn R2 as well, or set format.act.bits=4."
            )
        if not sees_r1 and not context.quantizes("o_in") and context.scheme.kv is None:
            raise ConfigError(
                f"format.act.bits=16 and format.kv.bits=16 with transform={self.name}: the model is invariant under its "
                "rotations until an activation is quantized, so there is nothing to learn; set format.act.bits=4, or use "
                "transform=quarot."
            )


def switch(field: str, value: str | bool) -> str:
    """auto | on | off; YAML reads a bare on or off as a truth value."""
    value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if value not in ("auto", "on", "off"):
        raise ConfigError(f"{field}={value}: choose one of auto, on, off.")
    return value
