"""Placements in safetensors files: every matrix under a readable name, the rest in the header.

The structure around the matrices is JSON there. A file in SpinQuant's layout is read too: `R1`
[hidden, hidden] and `R2` [head_dim, head_dim] under the name of each block's attention. SpinQuant
itself writes a pickle, which is not opened, for unpickling runs code; save its dictionary with
`safetensors.torch.save_file` instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.codecs.codec import Blocks, Codec
from harness.codecs.packing import pack, unpack
from harness.codecs.placement import Placement, Where
from harness.config.errors import ConfigError, DataError
from harness.linalg.stiefel import deviation, project
from harness.store import intact, save_tensors
from harness.transforms.base import ModelShape, Transform
from harness.transforms.rotations import Rotations

R2_NAME = re.compile(r".*\.(\d+)\.\w+\.R2")


def save(path: Path, placement: Placement, facts: Mapping, learned: str = "") -> None:
    """Write a placement in one step.

    facts: JSON that says what it belongs to, checked on loading. learned: the key of what was
    learned, by which a later run knows the file as its own.
    """
    tensors: dict[str, Tensor] = {}
    spec = {"learned": learned, "facts": dict(facts), **pack(placement, tensors)}
    save_tensors(path, tensors, {"placement": json.dumps(spec)})


def load_intact(
    path: Path, transform: Transform, shape: ModelShape, damaged: Callable[[Path, str], None]
) -> Placement | None:
    """`load`, or None where there is no such file, or it is damaged, which `damaged` is told."""
    return None if intact(path, damaged) is None else load(path, transform, shape)


def load(path: Path, transform: Transform, shape: ModelShape) -> Placement:
    """The placement in a file of `save` or of SpinQuant's layout.

    It is completed by the transform with what that does not learn. Raises DataError where a matrix
    of SpinQuant's is not orthogonal at all.
    """
    with safe_open(path, "pt") as file:
        names = file.keys()
        # copies: the file is mapped, and may be replaced while they are in use
        tensors = {name: file.get_tensor(name).clone() for name in names}
        header = file.metadata() or {}
    field = f"transform.load={path}"
    if "placement" in header:
        placement = unpack(_described(header, field), tensors)
    else:
        placement = _spinquant(tensors, field)
    return transform.complete(shape, placement)


def _spinquant(tensors: Mapping[str, Tensor], field: str) -> Placement:
    """R1 and the R2 of every layer, from SpinQuant's names."""
    for name, matrix in tensors.items():
        off = deviation(matrix)
        if off > 1e-2:
            raise DataError(f"{field}: {name} is not orthogonal, |R R^T - I| reaches {off:.2g}.")
    # SpinQuant's own have drifted from the group by up to 1e-3
    blocks = {name: Blocks(project(matrix.double())) for name, matrix in tensors.items()}
    r2 = {}
    for name, codec in blocks.items():
        match = R2_NAME.fullmatch(name)
        if match is not None:
            r2[int(match[1])] = codec
    # layers by number: as text, 10 comes before 2
    merged: dict[Where, Codec] = {(layer, "o_in"): r2[layer] for layer in sorted(r2)}
    return Placement(blocks["R1"], merged)


def _described(header: Mapping[str, str], field: str) -> dict:
    """The JSON of a file of `save`; raises ConfigError, beginning with `field`, for none."""
    try:
        spec = json.loads(header["placement"])
    except ValueError:
        spec = None
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{field}: damaged, its header cannot be read; "
            "learn the matrices again with transform.load=null."
        )
    return spec


def check(path: str, transform: Transform, shape: ModelShape, facts: Mapping) -> None:
    """Refuse a file that cannot serve (ConfigError): missing, a pickle, damaged, of another model,
    of other shapes. A file of `save` is read whole, for its digest; those of others have none."""
    field = f"transform.load={path}"
    if not isinstance(path, str) or not Path(path).is_file():
        raise ConfigError(f"{field}: no such file.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError:
        raise ConfigError(
            f"{field}: not a safetensors file. A pickled rotation is not opened; "
            "save its dictionary again with safetensors.torch.save_file."
        ) from None
    if "digest" in header and intact(Path(path)) is None:
        raise ConfigError(
            f"{field}: damaged, its digest does not fit; copy it again, or learn it "
            "again with transform.load=null."
        )
    if "placement" in header:
        _check_facts(_described(header, field), field, facts)
    else:
        _check_spinquant(shapes, field, transform, shape)


def _check_facts(spec: Mapping, field: str, facts: Mapping) -> None:
    """What a file of `save` belongs to is what this run has."""
    stored = spec.get("facts")
    if not isinstance(stored, Mapping):
        raise ConfigError(
            f"{field}: damaged, it does not say what its matrices belong to; learn them again."
        )
    for name, fact in facts.items():
        if stored.get(name) != fact:
            raise ConfigError(
                f"{field}: its {name} is {stored.get(name)}, this run's is {fact}; "
                "learn it again with transform.load=null, or load the file that belongs to "
                "this run."
            )


def _check_spinquant(
    shapes: Mapping[str, tuple], field: str, transform: Transform, shape: ModelShape
) -> None:
    """A file of SpinQuant's layout has all matrices of this model, and no others."""
    if "R1" not in shapes or not isinstance(transform, Rotations) or not transform.residual:
        raise ConfigError(
            f"{field}: neither a file of transform.save nor of SpinQuant's layout for a transform "
            "that has R1."
        )
    expected = {"R1": (shape.hidden, shape.hidden)}
    if transform.r2 and shape.structure is not None:
        head = (shape.head_dim, shape.head_dim)
        blocks = shape.structure.blocks
        attention = shape.structure.attention.items()
        expected |= {f"{blocks}.{i}.{each.module}.R2": head for i, each in attention}
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise ConfigError(
                f"{field}: {name} has shape {list(shapes.get(name, ()))}, this model with "
                f"transform.r2={str(transform.r2).lower()} takes {list(expected.get(name, ()))}."
            )
