"""The tensors in a checkpoint of this project, by the names of a model's parameters.

A quantized weight stands in its files as codes and scales, {module}.codes, .scale, .zero and
.global_scale, and is one only if these are what its format makes of a weight of that shape; any
other parameter or buffer stands there as it is. native.py says what else a folder holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from harness.checkpoints.native_files import RECORD
from harness.checkpoints.record import Record
from harness.config.errors import DataError
from harness.formats import Format, QTensor, Scales
from harness.models.weights import tensor_files

PARTS = ("codes", *(field.name for field in fields(Scales)))  # of a quantized weight


class Tensors:
    """The tensors of a folder by name, on a device, while the stack is open.

    Each comes in memory of its own, so that no file stays mapped.
    """

    def __init__(self, folder: Path, stack: ExitStack, device: torch.device):
        self.folder = folder
        self.device = device
        self.files = tensor_files(folder)
        self.opened = {
            path: stack.enter_context(safe_open(path, "pt")) for path in set(self.files.values())
        }

    def find(self, name: str) -> Tensor | None:
        """The tensor, None where the files have no such."""
        if name not in self.files:
            return None
        return self.opened[self.files[name]].get_tensor(name).to(self.device, copy=True)

    def take(self, name: str) -> Tensor:
        """The tensor. Raises DataError where the files have no such."""
        tensor = self.find(name)
        if tensor is None:
            raise DataError(f"{self.folder}: its files lack the tensor {name}; export it again.")
        return tensor


def stored(name: str, shape: torch.Size, record: Record, tensors: Tensors) -> Tensor | QTensor:
    """What the files hold of the parameter or buffer of that name and shape."""
    owner, _, leaf = name.rpartition(".")
    if leaf != "weight" or owner not in record.weights:
        return tensors.take(name)
    # which scales there are is the format's matter; codes there are always
    state = {"codes": tensors.take(f"{owner}.codes")}
    for part in PARTS[1:]:
        scale = tensors.find(f"{owner}.{part}")
        if scale is not None:
            state[part] = scale
    format = record.weights[owner]
    _refuse_other_state(owner, format, state, shape)
    return QTensor.from_state(format, state, shape, record.dtype)


def changed(model: nn.Module, folder: Path) -> str | None:
    """The first parameter or buffer of a dense model that is not what its folder holds, None where
    all are; what stands beside a text decoder is not looked at."""
    record = Record.read(folder)
    with ExitStack() as stack:
        tensors = Tensors(folder, stack, torch.device("cpu"))
        for name, own in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
            codes = f"{name.removesuffix('.weight')}.codes"
            if name not in tensors.files and codes not in tensors.files:
                continue  # of a tower, by another name there
            tensor = stored(name, own.shape, record, tensors)
            if isinstance(tensor, QTensor):
                tensor = tensor.dequantize()
            if not torch.equal(tensor.to(own.dtype), own.cpu()):
                return name
    return None


def _refuse_other_state(
    name: str, format: Format, state: Mapping[str, Tensor], shape: torch.Size
) -> None:
    """Raise DataError where codes and scales are not those of a weight of that shape in that
    format, as one row tells.
    """
    row = format.quantize(torch.zeros(1, shape[-1])).state()
    groups = format.split(torch.empty(shape, device="meta")).shape[:-1].numel()
    whole = dict.fromkeys(row, groups) | {
        "codes": row["codes"].numel() * shape[0],
        "global_scale": 1,
    }
    for part in sorted({*row, *state}):
        if part in row and part in state:
            same = part != "codes" or state[part].dtype == row[part].dtype
            if same and state[part].numel() == whole[part]:
                continue
        raise DataError(
            f"{RECORD} gives {name} the format {type(format).__name__}, and {part} in the file is "
            "not one's; export it again."
        )
