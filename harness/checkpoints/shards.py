"""A model's tensors in safetensors files of bounded size, one of which is in memory at a time.

Nothing is known of them but names and sizes: layouts make them, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from harness.models.weights import INDEX, SINGLE
from harness.store import replacing, write_json

SHARD = 4_000_000_000  # bytes of tensors a file
DIGIT = "[0-9]"
# every file of that layout, as patterns of glob and of the hub
LAYOUT = (SINGLE, INDEX, f"model-{5 * DIGIT}-of-{5 * DIGIT}.safetensors")


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write (name, tensor) into files of at most SHARD bytes, and an index where they are many.

    Files have the names that transformers gives its own: model-00001-of-00002.safetensors.
    """
    shards = _save(tensors, folder)
    if len(shards) > 1:
        total = sum(size for _, size in shards.values())
        names = {tensor: file for tensor, (file, _) in shards.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def laid(folder: Path) -> list[Path]:
    """The files of a folder that this layout gives weights and their index."""
    return [path for pattern in LAYOUT for path in folder.glob(pattern)]


def _save(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> dict[str, tuple[str, int]]:
    """Write shards of at most SHARD bytes, one in memory at a time; {tensor: (file, bytes)}."""
    shards: list[dict[str, int]] = []
    part: dict[str, Tensor] = {}

    def close() -> None:
        with replacing(folder / f"{len(shards)}.part") as temporary:
            save_file(part, temporary, metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in part.items()})
        part.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > SHARD:
            close()
        part[name] = tensor
    close()
    # a file's name says of how many it is one, which is known only now
    files = {}
    for index, sizes in enumerate(shards):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        files |= {name: (file, size) for name, size in sizes.items()}
    return files
