"""KVCache: how keys (after RoPE and the R3 rotation) and values are kept.

    integer         s and z of each vector of head_dim, or of groups of it
    fp8, fp8_e5m2   s of the same
    nvfp4           blocks of 16 with E4M3 scales, and a float32 scale of each vector
    mxfp4           blocks of 32 with power-of-two scales (mx_scale=even, as engines take them)

Each token is quantized by itself, so its scales are its own. scale=unit has none to be found: FP8
as a plain cast, NVFP4 with block scales alone, as engines keep them that were given no calibrated
scale. scale=static has one a layer, of its keys and of its values over the calibration text, as
engines read them: FP8's s = amax / max, in bfloat16, in which checkpoints hold it; NVFP4's float32
scale. With key_axis=channel it is G tokens of one channel of the keys that share a scale, for a
channel that is large is so in every token:

    K [tokens, head_dim]:  groups K[G i .. G i + G - 1, c]        V: groups of a token, as above

With a window of R tokens the newest are floats. Token t reads quantized, of the tokens before it,
the keys s < R floor(t / R), whose last R were full and were quantized then, and the values
s < t - R (models/window.py).

Sources: QuaRot (arXiv 2404.00456), section 4 (integers); KIVI (arXiv 2402.02750) and its code
(windows, key_axis); vLLM (kv_cache_dtype=fp8 with scales of 1, or k_scale and v_scale of a file);
ModelOpt (NVFP4_KV, whose float32 scale is calibrated, once a layer).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.config.checks import integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats.base import Format
from harness.formats.fp8 import FP8
from harness.formats.integer import Integer
from harness.formats.mxfp import MX
from harness.formats.nvfp4 import NVFP4

FLOATING = ("fp8", "fp8_e5m2", "nvfp4")  # kinds with a scale that may be known beforehand
BITS = {"integer": range(2, 9), "fp8": (8,), "fp8_e5m2": (8,), "nvfp4": (4,), "mxfp4": (4,)}


@dataclass(frozen=True)
class KVCache:
    """Keys and values in one format. Besides `kind`, as in the table above:

    bits: 2 .. 8 of integers, 8 of FP8, 4 of nvfp4 and mxfp4.
    group_size: null (head_dim: one vector per token and head), a divisor of head_dim (integers and
        FP8), or -1 (all heads of a token are one vector).
    scale: dynamic | unit | static (the last two of FP8 and nvfp4).
    window: how many of the newest tokens stay floats; 0: each is quantized as it comes.
    key_axis: token | channel (integers and FP8; with a window, which group_size divides).

    Of integers alone:

    incl0: whether zero lies in every asymmetric range: always | never (KIVI).
    symmetric, zp_order, zp_range: as Integer has them; compute_dtype: of the others, too.
    clip_k, clip_v: in (0, 1].
    zp: as Integer has it (float_offset: QuaRot's deployed cache).
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
    kind: str = "integer"
    scale: str = "dynamic"
    incl0: str = "always"
    key_axis: str = "token"
    window: int = 0

    def __post_init__(self):
        one_of("KVCache: kind", self.kind, BITS)
        one_of("KVCache: scale", self.scale, ("dynamic", "unit", "static"))
        integer("KVCache: bits", self.bits)
        one_of("KVCache: bits", self.bits, BITS[self.kind])
        if self.group_size != -1:
            integer("KVCache: group_size", self.group_size, optional=True)
            if self.kind in ("nvfp4", "mxfp4") and self.group_size is not None:
                raise ConfigError(
                    f"KVCache: group_size={self.group_size} with kind={self.kind}: its blocks have "
                    "one size; set group_size=null, or -1."
                )
        if self.needs_static:
            self._check_static()
        number("KVCache: clip_k", self.clip_k, 1e-6, 1)
        number("KVCache: clip_v", self.clip_v, 1e-6, 1)
        one_of("KVCache: incl0", self.incl0, ("always", "never"))
        one_of("KVCache: key_axis", self.key_axis, ("token", "channel"))
        integer("KVCache: window", self.window, low=0)
        if self.key_axis == "channel":
            self._check_channels()
        try:
            self.part("key")
        except ConfigError as error:
            raise ConfigError(f"KVCache: {str(error).partition(': ')[2]}") from None

    def _check_static(self) -> None:
        """Refuse calibrated scales of what has none, or of groups."""
        if self.kind not in FLOATING:
            raise ConfigError(
                f"KVCache: scale=static with kind={self.kind}: only {', '.join(FLOATING)} have a "
                "scale of the layer; set scale=dynamic, or kind=fp8 with bits=8."
            )
        if self.group_size is not None:
            raise ConfigError(
                f"KVCache: scale=static with group_size={self.group_size}: a layer has one scale; "
                "set group_size=null, or scale=dynamic."
            )

    def _check_channels(self) -> None:
        """Refuse groups of tokens that the window would not fill."""
        group = self.group_size
        if group is None or group < 1:
            raise ConfigError(
                f"KVCache: key_axis=channel with group_size={group}: that many tokens share a "
                "scale; set group_size=32 with kind=integer or fp8, or key_axis=token."
            )
        if not self.window or self.window % group:
            raise ConfigError(
                f"KVCache: key_axis=channel with window={self.window}: a group of {group} tokens "
                f"is quantized once it is full; set window to a multiple of {group}, or "
                "key_axis=token."
            )

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields without effect as the others are set."""
        zero = ("zp_order", "zp_range")
        if self.kind == "integer":
            if self.symmetric:
                return ("scale", "incl0", *zero)
            return ("scale",) if self.zp == "rounded" else ("scale", *zero)
        integers = ("symmetric", "incl0", "clip_k", "clip_v", "zp", *zero)
        if self.kind == "mxfp4":
            return (*integers, "scale")
        if self.scale == "unit" and self.kind != "nvfp4":  # one scale, which has no groups
            return (*integers, "group_size")
        return integers

    @property
    def needs_static(self) -> bool:
        """Whether scales are calibrated."""
        return self.scale == "static"

    def dynamic(self) -> KVCache:
        """The same with scales that follow from what is cached, before anything is calibrated."""
        return replace(self, scale="dynamic") if self.needs_static else self

    def part(self, name: str) -> Format:
        """The format of one head's vectors [.., head_dim]; name: key | value."""
        format = self._integer(name) if self.kind == "integer" else self._floating()
        return replace(format, compute_dtype=self.compute_dtype)

    @property
    def _geometry(self) -> tuple[str, int | None]:
        """granularity and group_size of what takes any."""
        if self.group_size in (None, -1):  # all that `fake` lays in a row
            return "token", None
        return "group", self.group_size

    def _floating(self) -> Format:
        if self.kind == "mxfp4":
            return MX(mx_scale="even", role="activation")
        unit = self.scale == "unit"
        if self.kind == "nvfp4":
            scope = "static" if self.needs_static else "token"
            return NVFP4(scope=scope, global_scale="none" if unit else "amax", role="activation")
        element = "e5m2" if self.kind == "fp8_e5m2" else "e4m3"
        if unit or self.needs_static:
            return FP8(
                granularity="tensor",
                range=self.scale,
                element=element,
                scale_dtype="bf16" if self.needs_static else "float32",
                role="activation",
            )
        granularity, group_size = self._geometry
        return FP8(
            granularity=granularity, group_size=group_size, element=element, role="activation"
        )

    def _integer(self, name: str) -> Integer:
        granularity, group_size = self._geometry
        return Integer(
            bits=self.bits,
            granularity=granularity,
            group_size=group_size,
            symmetric=self.symmetric,
            incl0=self.incl0,
            clip=self.clip_k if name == "key" else self.clip_v,
            zp=self.zp,
            zp_order=self.zp_order,
            zp_range=self.zp_range,
            role="activation",
        )

    def check(self, head_dim: int, field: str, where: str) -> None:
        """Refuse a head_dim that group_size does not divide (see Format.check)."""
        self.part("key").check(head_dim, field, where)

    def old(self, token: int, name: str) -> int:
        """How many tokens, from the first on, token number `token` (from 0) reads quantized where
        there is a window. name: key | value."""
        if name == "key":
            return token - token % self.window
        return max(0, token - self.window)

    def fake(self, x: Tensor, name: str, calibrated: Tensor | None = None) -> Tensor:
        """Keys or values x [batch, kv_heads, tokens, head_dim] as the cache would return them.

        name: key | value. Of keys with key_axis=channel, tokens in whole groups. calibrated: what
        `part(name).calibrated` made of the layer's range, with scale=static.
        """
        fake = self.part(name).fake(self._laid(x, name), global_scale=calibrated)
        if self._by_channel(name):
            return fake.mT
        if self.group_size == -1:
            return fake.view(x.transpose(-3, -2).shape).transpose(-3, -2)
        return fake

    def token_bits(self, heads: int, head_dim: int) -> float:
        """Stored bits that one more token takes in one layer, as it is quantized."""
        count = max(1, self.window)  # of tokens that are quantized together
        once, twice = (
            sum(self._bits(torch.zeros(heads, n, head_dim), name) for name in ("key", "value"))
            for n in (count, 2 * count)
        )
        return (twice - once) / count

    def _bits(self, x: Tensor, name: str) -> int:
        """Stored bits of keys or values x [heads, tokens, head_dim]."""
        format = self.part(name)
        one = x.new_ones(())
        calibrated = format.calibrated(-one, one) if self.needs_static else None
        return format.quantize(self._laid(x, name), global_scale=calibrated).bits()

    def _by_channel(self, name: str) -> bool:
        return name == "key" and self.key_axis == "channel"

    def _laid(self, x: Tensor, name: str) -> Tensor:
        """x [.., heads, tokens, head_dim] with what shares scales side by side."""
        if self._by_channel(name):
            return x.mT
        if self.group_size == -1:  # a token's heads make one group
            return x.transpose(-3, -2).flatten(-2)
        return x
