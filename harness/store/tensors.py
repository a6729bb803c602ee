"""Tensors in safetensors files that prove themselves: `digest` among the metadata is the SHA-256
of the header without it (keys in order) and of the data.

    8 bytes: length n of the header | n bytes: JSON {"__metadata__": .., name: {"dtype", "shape",
    "data_offsets"}} | data        (https://huggingface.co/docs/safetensors, "Format")

safetensors reads them. It does not write them, for its writer gives every file mode 0600, has no
errno for a full disk, orders metadata by chance, and leaves a temporary of its own when killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from harness.store.files import replacing
from harness.store.records import MISFIT, Damaged, quiet

# Bytes: where the data begins. torch aligns its own memory so, and the last bit of a product
# depends on it: a matrix read from a file multiplies like the one that was written.
ALIGNED = 64
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def save_tensors(path: Path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Replace `path` by a record of {name: torch tensor} and {name: text}, in one step.

    Raises OSError naming `path`, KeyError for a dtype that no record holds.
    """
    import torch

    header: dict = {"__metadata__": dict(metadata or {})}
    data = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        begin = end
        end += tensor.nbytes
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        data.append(tensor.reshape(-1).view(torch.uint8).numpy())
    digest = _begun(header)
    for part in data:
        digest.update(part)
    header["__metadata__"]["digest"] = digest.hexdigest()
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data)


def intact(path: Path, damaged: Damaged = quiet) -> dict[str, str] | None:
    """The metadata of a record of `save_tensors`, or None where there is none or it is damaged.

    Reads the whole file and imports no torch: half a second a GB.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, os.fstat(file.fileno()).st_size)))
            metadata = header["__metadata__"]
            digest = metadata.pop("digest")
            fits = hashlib.file_digest(file, lambda: _begun(header)).hexdigest() == digest
    except FileNotFoundError:
        return None
    except OSError as error:
        damaged(path, f"it cannot be read: {error.strerror}")
        return None
    except (ValueError, LookupError, TypeError, AttributeError):
        damaged(path, "it holds no digest")
        return None
    if not fits:
        damaged(path, MISFIT)
        return None
    return metadata


def load_tensors(path: Path, damaged: Damaged = quiet) -> tuple[dict, dict[str, str]] | None:
    """({name: torch tensor}, {name: text}) of a record, or None as in `intact`."""
    from safetensors import safe_open

    metadata = intact(path, damaged)
    if metadata is None:
        return None
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def _begun(header: Mapping):
    """The hash of a header without its digest, to go on with the data."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())
