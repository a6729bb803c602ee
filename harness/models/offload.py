"""Models larger than memory: blocks stay in safetensors files, those in use are loaded.

`skeleton` builds a model whose blocks have no storage; embedding, norms outside the blocks and head
are read. An `OffloadedBlocks` reads a block while it is `open` (a forward of the block opens it by
itself) and drops its tensors afterwards. Changed blocks (merged transforms, quantized weights) are
written to a scratch folder first and read from there the next time.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.libraries.conversion import Conversion
from harness.libraries.transformers import compute_buffers, tied_names
from harness.models.source import refuse_nonfinite
from harness.models.weights import Weights
from harness.structure.composite import model_class
from harness.structure.derive import blocks_of


def read(names: Mapping[str, Path], device) -> dict[str, Tensor]:
    """Those tensors in memory of their own, so that no file stays mapped."""
    tensors = {}
    for path in dict.fromkeys(names.values()):
        with safe_open(path, "pt") as file:
            for name, where in names.items():
                if where == path:
                    tensors[name] = file.get_tensor(name).to(device, copy=True)
    return tensors


class Files:
    """A folder's weights for a model, read a part at a time.

    weights: those that weights.py found to fit. model: without storage, in the dtype asked for.
    """

    def __init__(self, weights: Weights, model: PreTrainedModel):
        self.weights = weights
        self.conversion = Conversion(model)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def read(self, wanted: Callable[[str], bool], device) -> dict[str, Tensor]:
        """{parameter: tensor} of those that are wanted.

        Raises DataError for a tensor that is not finite.
        """
        names = {
            name: file
            for name, file in self.weights.files.items()
            if wanted(self.weights.parameters[name][0])
        }
        tensors = self.conversion.converted(read(names, device))
        for name, tensor in tensors.items():
            refuse_nonfinite(name, tensor)
        return {name: tensor.to(self.dtypes[name]) for name, tensor in tensors.items()}


def skeleton(config, weights: Weights, dtype: torch.dtype, device) -> nn.Module:
    """A model of that config with everything but its blocks' weights read.

    weights: those that weights.py found to fit. Raises DataError for a tensor that is not finite.
    """
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=dtype)
    files = Files(weights, model)
    blocks = f"{blocks_of(model)}."
    compute_buffers(model, device)
    tied = tied_names(model)
    tensors = files.read(lambda name: not name.startswith(blocks), device)
    for name, tensor in tensors.items():
        assign(model, name, tensor)
    # files may hold a head of their own, whatever the config says
    one = all(
        name not in tensors or torch.equal(tensors[name], tensors[source])
        for name, source in tied.items()
    )
    if tied and one:
        model.tie_weights()
    return model


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer, or of what experts were made of it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    part = "bias" if leaf.endswith("_bias") else "weight"
    experts = owner._modules.get(leaf.removesuffix("_bias"))
    if isinstance(experts, nn.ModuleList):
        turned = part == "weight" and owner.is_transposed
        for linear, each in zip(experts, tensor.mT.contiguous() if turned else tensor):
            linear._buffers[part] = each
    elif leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


class OffloadedBlocks:
    """The blocks of a skeleton, by the files of its weights.

    prefix: of the blocks' names; scratch: folder for changed ones, emptied at once and by `close`.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        prefix: str,
        files: Files,
        scratch: Path,
        device: torch.device,
    ):
        self.blocks = blocks
        self.scratch = scratch
        self.device = device
        self.files = files
        self.prefix = prefix
        self._users = [0] * len(blocks)  # a forward of an open block opens it once more
        self.close()
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._take(index))
            block.register_forward_hook(
                lambda *_, index=index: self._put_back(index), always_call=True
            )

    def close(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    @contextmanager
    def open(self, index: int, write: bool = False) -> Iterator[None]:
        """Within it block `index` is in memory; write: keep what was changed."""
        self._take(index)
        try:
            yield
            if write:
                self._save(index)
        finally:
            self._put_back(index)

    def _take(self, index: int) -> None:
        self._users[index] += 1
        if self._users[index] > 1:
            return
        start = f"{self.prefix}.{index}."
        changed = self._changed(index)
        if changed.is_file():
            with safe_open(changed, "pt") as file:
                names = dict.fromkeys(file.keys(), changed)
            tensors = read(names, self.device)
        else:
            tensors = self.files.read(lambda name: name.startswith(start), self.device)
        for name, tensor in tensors.items():
            assign(self.blocks[index], name.removeprefix(start), tensor)

    def _put_back(self, index: int) -> None:
        self._users[index] -= 1
        if self._users[index] == 0:
            for name, tensor in self._tensors(index).items():
                assign(self.blocks[index], name, tensor.to("meta"))
            trim()

    def _save(self, index: int) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        start = f"{self.prefix}.{index}."
        save_file(
            {start + name: tensor.contiguous() for name, tensor in self._tensors(index).items()},
            self._changed(index),
        )

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """{block-relative name: tensor} of what is read, as it is now."""
        return {
            name: tensor.detach()
            for name, tensor in self.blocks[index].state_dict().items()
            if not name.endswith("global_scale")  # an activation's, which no file holds
        }

    def _changed(self, index: int) -> Path:
        return self.scratch / f"{index:04d}.safetensors"


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    # the holes that blocks leave in its heap would add up to a gigabyte over 20 blocks
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
