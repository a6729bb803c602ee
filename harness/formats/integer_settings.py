"""Settings of integer formats: which codes and zero points they give, and which contradict.

With b bits, symmetric codes are -2^(b-1) .. 2^(b-1) - 1, asymmetric ones 0 .. 2^b - 1; what is
computed with them is in integer.py, whose symbols the settings are told in.
"""

from dataclasses import dataclass

from harness.config.checks import integer, number
from harness.config.errors import ConfigError
from harness.formats.base import Format
from harness.formats.settings import SCALE_DTYPES

ZERO_BITS = {"rounded": None, "float_offset": 32, "half_offset": 16}  # None: those of a code
WIDTHS = tuple(range(2, 9))


@dataclass(frozen=True)
class IntegerSettings(Format):
    """The knobs of an integer grid, besides the shared ones, and what follows from them alone.

    int_range: full (least code -Q - 1) | narrow (-Q).
    int_scale: qmax (A / Q) | half_range (A / (N / 2)) | aimet (max(M / Q, -m / (Q + 1))).
    zp_order: round_then_add | add_then_round (RNE(x / s + z)).
    zp_range: unsigned (codes 0 .. N) | signed (codes and z shifted by 2^(b-1)).
    incl0: whether 0 lies in every asymmetric range: auto (all but unsigned groups) | always | never
        (not with signed zero points). Where it does, z is a code, and clamped to be one.
    clip: factor in (0, 1] on m and M.
    zp: rounded | float_offset (z = m, q = RNE((x - m) / s), dq = q * s + m) | half_offset (the
        same with m rounded to float16 before codes are computed, as GGML's Q4_1 stores it).
    scale_dtype: float32 | bf16 | fp16 | input, rounded before codes are computed (bf16 of a float16
        tensor: to a number that float16 holds, too).
    degenerate: auto (weights: A or M - m is at least 1e-5; activations: s = 1 where A = 0; a zero
        range becomes [-1, 1]; an offset: M - m is at least 1e-5) | eps (s = 0 becomes the
        dtype's epsilon, z = 0) | one (s = 0 becomes 1, and z = NaN if asymmetric, as FP-Quant has
        it).
    range: dynamic (of each tensor) | static (calibrated; activations with granularity=tensor).
    """

    granularity: str = "channel"
    int_range: str = "full"
    int_scale: str = "qmax"
    zp_order: str = "round_then_add"
    zp_range: str = "unsigned"
    incl0: str = "auto"
    clip: float = 1.0
    zp: str = "rounded"
    scale_dtype: str = "float32"
    degenerate: str = "auto"
    range: str = "dynamic"

    slack = 0.5
    widths = WIDTHS  # what `bits` may be

    def __post_init__(self):
        super().__post_init__()
        integer("Integer: bits", self.bits)
        self._choose("bits", *self.widths)
        self._choose("int_range", "full", "narrow")
        self._choose("int_scale", "qmax", "half_range", "aimet")
        self._choose("zp_order", "round_then_add", "add_then_round")
        self._choose("zp_range", "unsigned", "signed")
        self._choose("incl0", "auto", "always", "never")
        number("Integer: clip", self.clip, 1e-6, 1)
        self._choose("zp", *ZERO_BITS)
        self._choose("scale_dtype", *SCALE_DTYPES, "input")
        self._choose("degenerate", "auto", "eps", "one")
        self._choose("range", "dynamic", "static")
        if self.range == "static" and (self.role, self.granularity) != ("activation", "tensor"):
            raise ConfigError(
                f"Integer: range=static with role={self.role} and granularity={self.granularity}: "
                "only an activation with granularity=tensor has a calibrated range; "
                "set range=dynamic."
            )
        if self.signed and not self.symmetric and self.incl0 == "never":
            raise ConfigError(
                "Integer: incl0=never with zp_range=signed: a signed zero point is a code, "
                "so 0 lies in every range; set incl0=auto, or zp_range=unsigned."
            )
        if self.symmetric and self.shifted:
            raise ConfigError(
                f"Integer: zp={self.zp} needs symmetric=false; a symmetric grid has no offset."
            )

    @property
    def unread(self) -> tuple[str, ...]:
        if self.symmetric:
            return (*super().unread, "zp_order", "zp_range", "incl0")
        if self.shifted:
            return (*super().unread, "int_range", "int_scale", "zp_order", "zp_range")
        return (*super().unread, "int_range", "int_scale")

    @property
    def shifted(self) -> bool:
        """Whether z is a value, the least of the range, and no code."""
        return self.zp != "rounded"

    @property
    def signed(self) -> bool:
        return self.symmetric or (self.zp_range == "signed" and not self.shifted)

    @property
    def spans_zero(self) -> bool:
        """Whether 0 lies in every group's range, so that rounded zero points are codes."""
        auto = self.signed or self.granularity != "group"
        return self.symmetric or self.incl0 == "always" or (self.incl0 == "auto" and auto)

    @property
    def zero_bits(self) -> int:
        return ZERO_BITS[self.zp] or self.bits

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (self.symmetric and self.int_range == "narrow")

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    @property
    def reach(self) -> tuple[float, float]:
        return self.qmin, self.qmax

    @property
    def needs_static(self) -> bool:
        return self.range == "static"

    @property
    def spans_tokens(self) -> bool:
        """A calibrated range is no tensor's own, unless it is shrunk by a search over each."""
        return super().spans_tokens and not (self.needs_static and self.observer == "minmax")
