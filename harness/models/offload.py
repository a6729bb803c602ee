"""Models larger than memory: blocks stay in safetensors files, those in use are loaded.

`skeleton` builds a model whose blocks have no storage; embedding, norms outside the blocks and head
are read. An `OffloadedBlocks` reads a block while it is `open` (a forward of the block opens it by
itself) and drops its tensors afterwards. Changed blocks (merged transforms, quantized weights) are
written to a scratch folder first and read from there the next time.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.libraries.transformers import tied_names
from harness.models.source import refuse_nonfinite
from harness.structure.derive import blocks_of


def read(names: Mapping[str, Path], dtype: torch.dtype, device) -> dict[str, Tensor]:
    """Those tensors in memory of their own, so that no file stays mapped."""
    tensors = {}
    for path in dict.fromkeys(names.values()):
        with safe_open(path, "pt") as file:
            for name, where in names.items():
                if where == path:
                    mapped = file.get_tensor(name)
                    tensor = torch.empty(mapped.shape, dtype=dtype, device=device)
                    tensors[name] = tensor.copy_(mapped)
    return tensors


def skeleton(config, files: Mapping[str, Path], dtype: torch.dtype, device) -> nn.Module:
    """A model of that config with everything but its blocks' weights read.

    files: those that weights.py found to fit. Raises DataError for a tensor that is not finite.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    blocks = f"{blocks_of(model)}."
    # what is computed from the config, not stored: the rotary table
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=config).to(device))
    tied = tied_names(model) if config.tie_word_embeddings else {}
    outside = {name: file for name, file in files.items() if not name.startswith(blocks)}
    tensors = read(outside, dtype, device)
    for name, tensor in tensors.items():
        refuse_nonfinite(name, tensor)
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
    """Put a tensor in place of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


class OffloadedBlocks:
    """The blocks of a skeleton. files: {absolute name: file}.

    prefix: of the blocks' names; scratch: folder for changed ones, emptied at once and by `close`.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        prefix: str,
        files: Mapping[str, Path],
        scratch: Path,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.blocks = blocks
        self.scratch = scratch
        self.dtype = dtype
        self.device = device
        self.files = []
        for index, block in enumerate(blocks):
            # by the block's names, for a file may hold more, such as old rotary tables
            names = [f"{prefix}.{index}.{name}" for name in block.state_dict()]
            self.files.append({name: files[name] for name in names if name in files})
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
        original = not changed.is_file()
        files = self.files[index]
        if not original:
            files = dict.fromkeys(files, changed)
        for name, tensor in read(files, self.dtype, self.device).items():
            if original:
                refuse_nonfinite(name, tensor)
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
        """{block-relative name: tensor} of what the files hold, as it is now."""
        tensors = {}
        for absolute in self.files[index]:
            name = absolute.removeprefix(f"{self.prefix}.{index}.")
            owner, _, leaf = name.rpartition(".")
            tensors[name] = getattr(self.blocks[index].get_submodule(owner), leaf).detach()
        return tensors

    def _changed(self, index: int) -> Path:
        return self.scratch / f"{index:04d}.safetensors"


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    # the holes that blocks leave in its heap would add up to a gigabyte over 20 blocks
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
