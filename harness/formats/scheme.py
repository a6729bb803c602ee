"""Scheme: which formats the tensors of a model take; what a file of conf/format describes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from harness.config.errors import ConfigError
from harness.formats.base import Format
from harness.formats.cache import KVCache
from harness.formats.integer import Integer

# {(block index, block-relative name): {weight and/or act: ratio in (0, 1]}}
Clips = Mapping[tuple[int | None, str], Mapping[str, float]]
ROLES = {"weight": "weight", "act": "activation"}  # what a part of a scheme calls its formats


@dataclass(frozen=True)
class Scheme:
    """Formats of weights, activations and the KV cache; None leaves a part in the model's dtype.

    overrides: {(block index, block-relative name): {weight and/or act: Format or None}} for single
    linears; a part not named there is that of all. What stands outside the blocks (None, absolute
    name) is quantized by an override only.
    """

    name: str = "none"
    weight: Format | None = None
    act: Format | None = None
    kv: KVCache | None = None
    overrides: Mapping[tuple[int | None, str], Mapping[str, Format | None]] = field(
        default_factory=dict
    )

    def __post_init__(self):
        everywhere = {"weight": self.weight, "act": self.act}
        for where, parts in (("format", everywhere), *self.overrides.items()):
            for part, format in parts.items():
                if part not in ROLES:
                    raise ConfigError(
                        f"format.overrides: {where}.{part} is not a part; choose weight or act"
                    )
                if format is not None and format.role != ROLES[part]:
                    raise ConfigError(
                        f"{where}.{part}.role={format.role} is not legal; "
                        f"set {where}.{part}.role={ROLES[part]}"
                    )

    def part(self, name: str, layer: int | None, linear: str) -> Format | None:
        """The format of part `name` (weight | act) of one linear."""
        parts = self.overrides.get((layer, linear), {})
        if name in parts:
            return parts[name]
        return None if layer is None else getattr(self, name)

    def seen(self, *parts: str) -> "Scheme":
        """The scheme with these parts (weight, act, kv) alone, those of overrides included.

        What a transform learns with.
        """
        overrides = {
            where: {part: formats[part] for part in parts if part in formats}
            for where, formats in self.overrides.items()
        }
        return Scheme(
            self.name,
            weight=self.weight if "weight" in parts else None,
            act=self.act if "act" in parts else None,
            kv=self.kv if "kv" in parts else None,
            overrides=overrides,
        )

    def clipped(self, clips: Clips, parts: Iterable[str] = tuple(ROLES)) -> "Scheme":
        """The scheme with integer formats of these parts clipped, linear by linear.

        Formats of other kinds, which have no such ratio, stay.
        """
        if not clips:
            return self
        overrides = {where: dict(formats) for where, formats in self.overrides.items()}
        for (layer, linear), ratios in clips.items():
            for part in ratios.keys() & set(parts):
                format = self.part(part, layer, linear)
                if isinstance(format, Integer):
                    clipped = replace(format, clip=format.clip * ratios[part])
                    overrides.setdefault((layer, linear), {})[part] = clipped
        return replace(self, overrides=overrides)

    def weights(self, layer: int | None, linears: Iterable[str]) -> dict[str, Format]:
        """{name: weight format} of those linears of a block that are quantized."""
        formats = {name: self.part("weight", layer, name) for name in linears}
        return {name: format for name, format in formats.items() if format is not None}

    def any(self, name: str) -> bool:
        """Whether part `name` (weight | act) of any linear is quantized."""
        overrides = (parts.get(name) for parts in self.overrides.values())
        return any(format is not None for format in (getattr(self, name), *overrides))

    @property
    def spans_tokens(self) -> bool:
        """Whether any activation is read on scales that span tokens (Format.spans_tokens)."""
        acts = (self.act, *(parts.get("act") for parts in self.overrides.values()))
        return any(act is not None and act.spans_tokens for act in acts)

    @property
    def outside(self) -> bool:
        """Whether anything outside the blocks is quantized."""
        return any(
            format is not None
            for (layer, _), parts in self.overrides.items()
            if layer is None
            for format in parts.values()
        )
