"""Settings that all formats share: which values they have, and which contradict each other.

Raises ConfigError, with the setting to change, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from harness.config.checks import boolean, integer, one_of
from harness.config.errors import ConfigError
from harness.formats.geometry import Geometry
from harness.formats.observers import MSE

# Observers that leave the choice of a weight's scales to its solver, which has a Hessian.
UNDER_HESSIAN = ("hessian", "hessian_diagonal")
# Scales of integers, FP4 and FP8 may be stored as one of these, or as the tensor itself (`input`).
SCALE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings(Geometry):
    """The knobs of a format, and what follows from them alone.

    granularity: tensor | channel (weight row) | token (activation row) | group (of group_size
        elements); FP8 has another.
    observer: minmax | mse (its knobs in `mse`) | hessian | hessian_diagonal (of weights: solvers
        choose among `nearby` of minmax's scales; solvers/search.py).
    compute_dtype: float32 | input.
    pad: error | zero, for a last axis that the group does not divide.
    role: weight | activation; a weight must be finite, and degenerate integer groups differ.
    """

    bits: int = 4
    granularity: str = "group"
    group_size: int | None = None
    symmetric: bool = True
    observer: str = "minmax"
    mse: MSE | Mapping = field(default_factory=MSE)
    compute_dtype: str = "float32"
    pad: str = "error"
    role: str = "weight"

    def __post_init__(self):
        name = type(self).__name__
        if not isinstance(self.mse, MSE):
            # the one way to set a field of a frozen class
            object.__setattr__(self, "mse", MSE.of(self.mse, f"{name}: mse"))
        self._choose("granularity", *self.granularities)
        boolean(f"{name}: symmetric", self.symmetric)
        self._choose("observer", "minmax", "mse", *UNDER_HESSIAN)
        self._choose("compute_dtype", "float32", "input")
        self._choose("pad", "error", "zero")
        self._choose("role", "weight", "activation")
        integer(f"{name}: group_size", self.group_size, optional=True)
        if self.under_hessian and self.role == "activation":
            raise ConfigError(
                f"{name}: observer={self.observer} is for weights: an activation's scales follow "
                "from what is read; set observer=minmax or mse."
            )
        if self.under_hessian and self.spans_rows:
            raise ConfigError(
                f"{name}: observer={self.observer} with granularity={self.granularity}: a scale "
                "spans rows; set granularity=channel or group, or observer=mse."
            )
        if (self.role, self.granularity) in (("weight", "token"), ("activation", "channel")):
            other = {"token": "channel", "channel": "token"}[self.granularity]
            raise ConfigError(
                f"{name}: granularity={self.granularity} is not for role={self.role}; "
                f"set granularity={other}."
            )
        if (self.granularity in ("group", "block")) != (self.group_size is not None):
            raise ConfigError(
                f"{name}: group_size={self.group_size} contradicts granularity={self.granularity}: "
                "a group needs a size, and nothing else has one (group_size=null)."
            )

    def _choose(self, field: str, *legal) -> None:
        """Refuse a value of `field` that is not one of `legal`."""
        one_of(f"{type(self).__name__}: {field}", getattr(self, field), legal)

    @property
    def _mse(self) -> MSE:
        """The knobs of the grid search; a mapping given as `mse` does not stay one."""
        assert isinstance(self.mse, MSE)
        return self.mse

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields without effect as the others are set."""
        return () if self.observer == "mse" else ("mse",)

    @property
    def under_hessian(self) -> bool:
        """Whether scales are to be chosen by the error under the Hessian of what is read."""
        return self.observer in UNDER_HESSIAN

    @property
    def zero_bits(self) -> int:
        return self.bits

    @property
    def spans_tokens(self) -> bool:
        """Whether an activation's scales follow from more than one token.

        Then whatever else is in the tensor, other texts and padding too, moves every value of it.
        """
        patient = self.observer == "mse" and self._mse.patience is not None  # until no group gains
        return self.granularity == "tensor" or patient

    def _compute(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the scales' arithmetic for a tensor stored as dtype."""
        return torch.float32 if self.compute_dtype == "float32" else dtype

    def _element(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the elements' arithmetic."""
        return self._compute(dtype)
