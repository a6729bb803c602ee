"""Scheme: which formats the tensors of a model take; what a file of conf/format describes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from harness.config.checks import integer, number
from harness.config.errors import ConfigError
from harness.formats.base import Format
from harness.formats.integer import Integer

ROLES = {"weight": "weight", "act": "activation"}  # what a part of a scheme calls its formats


@dataclass(frozen=True)
class KVCache:
    """Integer keys (after RoPE and the R3 rotation) and values.

    One scale and zero point per group, with zero in its range.

    bits: 2 .. 8.
    group_size: null (head_dim: one group per token and head), a divisor of head_dim, or -1 (all
        heads of a token together).
    clip_k, clip_v: in (0, 1].
    zp: rounded | float_offset (QuaRot's deployed cache).
    zp_order, zp_range, compute_dtype: as Integer has them.

    Source: QuaRot, section 4.
    """

    bits: int = 4
    symmetric: bool = False
    group_size: int | None = None
    clip_k: float = 0.95
    clip_v: float = 0.95
    zp: str = "rounded"
    zp_order: str = "round_then_add"
    zp_range: str = "unsigned"
    compute_dtype: str = "float32"

    def __post_init__(self):
        if self.group_size != -1:
            integer("KVCache: group_size", self.group_size, optional=True)
        number("KVCache: clip_k", self.clip_k, 1e-6, 1)
        number("KVCache: clip_v", self.clip_v, 1e-6, 1)
        try:
            self.part("key")
        except ConfigError as error:
            raise ConfigError(str(error).replace("Integer: ", "KVCache: ", 1)) from None

    unread = ()  # fields without effect

    def part(self, name: str) -> Integer:
        """The format of one head's vectors [.., head_dim]; name: key | value."""
        granularity = "group"
        group_size = self.group_size
        if group_size in (None, -1):  # all that `fake` lays in a row
            granularity = "token"
            group_size = None
        return Integer(
            bits=self.bits,
            granularity=granularity,
            group_size=group_size,
            symmetric=self.symmetric,
            incl0="always",
            clip=self.clip_k if name == "key" else self.clip_v,
            zp=self.zp,
            zp_order=self.zp_order,
            zp_range=self.zp_range,
            compute_dtype=self.compute_dtype,
            role="activation",
        )

    def check(self, head_dim: int, field: str, where: str) -> None:
        """Refuse a head_dim that group_size does not divide (see Format.check)."""
        self.part("key").check(head_dim, field, where)

    def fake(self, x: Tensor, name: str) -> Tensor:
        """Keys or values x [batch, kv_heads, tokens, head_dim] as the cache would return them.

        name: key | value.
        """
        if self.group_size != -1:
            return self.part(name).fake(x)
        # a token's heads side by side make one group
        tokens = x.transpose(1, 2)
        return self.part(name).fake(tokens.flatten(2)).view(tokens.shape).transpose(1, 2)


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
        """The scheme with these parts (act, kv) alone, those of overrides included.

        What a transform learns with.
        """
        overrides = {
            where: {part: formats[part] for part in parts if part in formats}
            for where, formats in self.overrides.items()
        }
        return Scheme(
            self.name,
            act=self.act if "act" in parts else None,
            kv=self.kv if "kv" in parts else None,
            overrides=overrides,
        )

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
