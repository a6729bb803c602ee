"""Placements in safetensors files: every matrix under a readable name, the structure around them as JSON in the header.

A file in SpinQuant's layout is read too: `R1` [hidden, hidden] and `model.layers.{i}.self_attn.R2` [head_dim, head_dim].
SpinQuant itself writes a pickle, which is not opened, for unpickling runs code; save its dictionary with
`safetensors.torch.save_file` instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.codecs.codec import Blocks
from harness.codecs.packing import pack, unpack
from harness.codecs.placement import Placement
from harness.config.errors import ConfigError, DataError
from harness.linalg.stiefel import deviation, project
from harness.store import intact, save_tensors
from harness.transforms.base import ModelShape, Transform
from harness.transforms.rotations import Rotations

R2_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.R2")


def save(path: Path, placement: Placement, facts: Mapping, learned: str = "") -> None:
    """Write a placement in one step; `facts` (JSON) say what it belongs to and are checked on loading; learned: the key of what
    was learned, by which a later run knows the file as its own."""
    tensors: dict[str, Tensor] = {}
    spec = {"learned": learned, "facts": dict(facts), **pack(placement, tensors)}
    save_tensors(path, tensors, {"placement": json.dumps(spec)})


def found(
    path: Path, transform: Transform, context: ModelShape, damaged: Callable[[Path, str], None]
) -> Placement | None:
    """`load`, or None where there is no such file or, as `damaged` is told then, it is damaged."""
    return None if intact(path, damaged) is None else load(path, transform, context)


def load(path: Path, transform: Transform, context: ModelShape) -> Placement:
    """The placement in a file of `save` or of SpinQuant's layout, completed by the transform with what it does not learn.

    SpinQuant's own matrices have drifted from the group by up to 1e-3 and are projected back. Raises DataError where a matrix
    is not orthogonal at all.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
    if "placement" not in header:
        for name, matrix in tensors.items():
            if (off := deviation(matrix)) > 1e-2:
                raise DataError(
                    f"transform.load={path}: {name} is not orthogonal, |R R^T - I| reaches {off:.2g}."
                )
        blocks = {name: Blocks(project(matrix.double())) for name, matrix in tensors.items()}
        r2 = {
            (int(R2_NAME.fullmatch(name)[1]), "o_in"): codec
            for name, codec in blocks.items()
            if name != "R1"
        }
        return transform.complete(context, Placement(blocks["R1"], dict(sorted(r2.items()))))
    return transform.complete(
        context, unpack(_described(header, f"transform.load={path}"), tensors)
    )


def _described(header: Mapping, field: str) -> dict:
    """The JSON of a file of `save`. Raises ConfigError, beginning with `field`, where it is none."""
    try:
        spec = json.loads(header["placement"])
    except ValueError:
        spec = None
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{field}: damaged, its header cannot be read; learn the matrices again with transform.load=null."
        )
    return spec


def check(path: str, transform: Transform, context: ModelShape, facts: Mapping) -> None:
    """Refuse a file that cannot serve (ConfigError): missing, a pickle, damaged, of another model, of
    other shapes. A file of `save` is read whole, for its digest; those of others have none."""
    field = f"transform.load={path}"
    if not isinstance(path, str) or not Path(path).is_file():
        raise ConfigError(f"{field}: no such file.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        raise ConfigError(
            f"{field}: not a safetensors file. A pickled rotation is not opened; save its dictionary again with "
            "safetensors.torch.save_file."
        ) from None
    if "digest" in header and intact(Path(path)) is None:
        raise ConfigError(
            f"{field}: damaged, its digest does not fit; copy it again, or learn it "
            "again with transform.load=null."
        )
    if "placement" in header:
        found = _described(header, field).get("facts")
        if not isinstance(found, Mapping):
            raise ConfigError(
                f"{field}: damaged, it does not say what its matrices belong to; learn them again."
            )
        for name, wanted in facts.items():
            if found.get(name) != wanted:
                raise ConfigError(
                    f"{field}: its {name} is {found.get(name)}, this run's is {wanted}; learn it again with "
                    "transform.load=null, or load the file that belongs to this run."
                )
        return
    if "R1" not in shapes or not isinstance(transform, Rotations) or not transform.residual:
        raise ConfigError(
            f"{field}: neither a file of transform.save nor of SpinQuant's layout for a transform that has R1."
        )
    wanted = {"R1": (context.hidden, context.hidden)}
    if transform.r2:
        wanted |= {
            f"model.layers.{i}.self_attn.R2": (context.head_dim, context.head_dim)
            for i in range(context.layers)
        }
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise ConfigError(
                f"{field}: {name} has shape {list(shapes.get(name, ()))}, this model with transform.r2="
                f"{str(transform.r2).lower()} takes {list(wanted.get(name, ()))}."
            )
