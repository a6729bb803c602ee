"""A folder's `transform_config` in the model that transformers made of the folder without it.

Run by compressed-tensors' own hooks, in float32. What is merged into weights is merged already, of
others' folders too; a matrix that the file has under one linear is that of all that share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from harness.config.errors import DataError
from harness.libraries.compressed_tensors import attach_transforms
from harness.libraries.saved import Saved
from harness.models.weights import stored, weight_files
from harness.structure.facts import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def run(model: PreTrainedModel, folder: Path) -> None:
    """Have the model run it, where the folder has one. Raises DataError where a matrix is missing
    in its files."""
    quantization = read_object(folder / "config.json").get("quantization_config")
    asked = quantization.get("transform_config") if isinstance(quantization, Mapping) else None
    if not asked:
        return
    held = stored(weight_files(folder))
    saved = Saved(model)
    read: set[int] = set()
    matrices = attach_transforms(model, asked)
    for name, matrix in matrices.items():
        there = held.get(saved.name(name))
        if there is not None:
            with safe_open(there.file, "pt") as file:
                matrix.copy_(file.get_tensor(saved.name(name)))
            read.add(id(matrix))
    lost = [name for name, matrix in matrices.items() if id(matrix) not in read]
    if lost:
        raise DataError(f"{folder} lacks {lost[0]}, of its transform_config; copy it again.")
