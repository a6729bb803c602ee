"""What stays online in a compressed-tensors file: a `transform_config`, which vLLM runs by itself.

    x -> x R before a linear quantizes its input,    R = diag(sigma) H_n for every block of n

The file's weights hold W R already, so a scheme is applied at `input` alone.

| R                     | type            | in vLLM                                    |
|-----------------------|-----------------|--------------------------------------------|
| H_n, n a power of two | hadamard        | a kernel, on CUDA and in 16 bits           |
| with signs, other n   | random-hadamard | a dense product with the matrix of the file |

As compressed-tensors saves it, the matrix stands in the file without its norm: sqrt(n) R, entries
+-1 and so exact in 16 bits, once for all linears that share it (LINEAR.online_0_input.weight).

Refused is what vLLM has no such place for: R3 (it reads `q_attn` and `k_cache`, and runs neither),
matrices that are not Hadamard, linears with a bias, which it refuses behind a transform, and NVFP4
activations in blocks of 16 to 128, which a kernel of its own scales otherwise. It finds linears by
the names of its own model, and leaves alone, without a word, those it does not find and routed
experts: so the families of models/engine.py alone. Tensor parallelism it refuses itself. Its dense
product has 1 / sqrt(n) rounded to the model's dtype. transformers drops `transform_config`;
online_reader.py has the library apply it. Source: vLLM 0.32, compressed_tensors/transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from harness.checkpoints.base import Snapshot
from harness.codecs.codec import Rotation
from harness.codecs.placement import HEAD_SITE
from harness.config.errors import ConfigError
from harness.formats import NVFP4
from harness.libraries.compressed_tensors import has_hadamard
from harness.libraries.saved import Saved
from harness.linalg.hadamard import Hadamard
from harness.models.engine import FAMILIES
from harness.transforms import ModelShape, Transform
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.rotations import Rotations

KERNEL = 2**15  # the largest block that vLLM's kernel takes
FUSED = (16, 32, 64, 128)  # blocks that it multiplies with and quantizes to NVFP4 in one kernel
WITH = "with export=compressed_tensors and export.engine=vllm"


@dataclass(frozen=True)
class Group:
    """The linears, by absolute name, whose input meets one matrix."""

    matrix: Hadamard
    linears: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The library's type of such a matrix."""
        signs = self.matrix.signs is not None
        return "random-hadamard" if dense(self.matrix.n, signs) else "hadamard"

    def entry(self, dtype: torch.dtype) -> Tensor:
        """sqrt(n) R [n, n], entries +-1."""
        return (self.matrix.dense() * math.sqrt(self.matrix.n)).round().to(dtype)


def dense(order: int, signs: bool) -> bool:
    """Whether vLLM has no kernel for blocks of that order and multiplies by the matrix."""
    power = order & (order - 1) == 0
    return signs or not power or order > KERNEL


def check(transforms: Sequence[Transform], shape: ModelShape, engine: str | None) -> list[str]:
    """Refuse (ConfigError), before any weight is loaded, what stays online and the engine would not
    run, or not as it was evaluated; returns warnings. engine: vllm, or None, which runs nothing."""
    warnings = []
    for transform in transforms:
        left = ", ".join(transform.leaves(shape))
        if left and engine is None:
            raise ConfigError(
                f"transform={transform.name} with export=compressed_tensors: {left} would have to "
                "run online, and transformers would not run it; set export.engine=vllm, for vLLM "
                "alone and Hadamard matrices before linears, or use export=harness."
            )
        if left:
            warnings += _check(transform, shape)
    return warnings


def _check(transform: Transform, shape: ModelShape) -> list[str]:
    """The same of one transform that vLLM is to run."""
    transform, orders = _hadamard(transform, shape)
    merged = "set transform.r4=off"
    if isinstance(transform, HadamardBlocks):
        merged = "use transform=quarot with transform.r4=off"
    for why in _unserved(shape, orders):
        _refuse(f"transform={transform.name}", why, merged)
    warnings = [
        "export.engine=vllm: transformers loads this file and drops its transform_config, so its "
        "logits are others there; serve it with vLLM, tensor_parallel_size=1"
    ]
    for order in sorted({order for each in orders.values() for order in each}):
        if not has_hadamard(order):
            why = f"compressed-tensors has no Hadamard matrix of order {order}"
            _refuse(f"transform={transform.name}", why, merged)
        if dense(order, transform.random_signs):
            norm = torch.tensor(order, dtype=torch.float64).rsqrt()
            off = float(norm.bfloat16().double() / norm) - 1
            warnings.append(
                f"export.engine=vllm: blocks of {order} are a dense product there, {order} steps "
                f"a feature, and in bfloat16 {off:+.1e} off in length; powers of two with "
                "transform.random_signs=false have a kernel"
            )
    return warnings


def groups(snapshot: Snapshot, engine: str | None) -> list[Group]:
    """What runs before which linears, in the order of the model. Raises ConfigError for what the
    engine would not run."""
    placements = snapshot.placements
    structure = snapshot.adapter.structure
    for placement in placements:
        codecs = [*placement.online.values()]
        places = [site for _, site in placement.online]
        plain = all(isinstance(codec, Rotation) for codec in codecs) and HEAD_SITE not in places
        if placement.query_key is not None or not plain:
            raise ConfigError(
                "a transform that stays online with export=compressed_tensors: it is no Hadamard "
                "matrix before the linears of a block, and nobody would run it; use export=harness."
            )
        if placement.online and engine is None:
            raise ConfigError(
                "a transform that stays online with export=compressed_tensors: transformers would "
                "not run it; set export.engine=vllm, or use export=harness."
            )
    found: dict[tuple, Group] = {}
    for layer in range(structure.layers):
        for site in structure.expanded(layer):
            matrices = [
                codec.matrix
                for placement in placements
                if isinstance(codec := placement.encoder(layer, site.name), Rotation)
            ]
            if len(matrices) > 1:
                raise ConfigError(
                    f"two transforms that stay online at {site.name} {WITH}: it runs one; use "
                    "export=harness."
                )
            for matrix in matrices:
                signs = None if matrix.signs is None else tuple(matrix.signs.tolist())
                group = found.setdefault((matrix.n, signs), Group(matrix))
                group.linears.extend(f"{structure.blocks}.{layer}.{name}" for name in site.linears)
    return list(found.values())


def config(found: Sequence[Group], saved: Saved) -> dict:
    """`transform_config` of config.json."""
    return {
        "config_groups": {
            name: {
                "type": group.kind,
                "apply": [{"targets": saved.modules(group.linears), "location": "input"}],
                "head_dim": group.matrix.n,
            }
            for name, group in _named(found)
        }
    }


def tensors(found: Sequence[Group], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, matrix) under the first linear that it stands before."""
    for name, group in _named(found):
        yield f"{group.linears[0]}.{name}_input.weight", group.entry(dtype)


def _named(found: Sequence[Group]) -> Iterator[tuple[str, Group]]:
    return ((f"online_{index}", group) for index, group in enumerate(found))


def _hadamard(
    transform: Transform, shape: ModelShape
) -> tuple[HadamardBlocks | Rotations, dict[str, set[int]]]:
    """(the transform, {site: orders of its blocks}) of what is Hadamard matrices before linears.
    Raises ConfigError for any other."""
    if isinstance(transform, HadamardBlocks):
        orders = transform.orders(shape.widths)
        return transform, {site: {order} for site, order in orders.items()}
    if not isinstance(transform, Rotations):
        left = ", ".join(transform.leaves(shape))
        why = f"{left} would have to run online, where vLLM runs Hadamard matrices alone"
        _refuse(f"transform={transform.name}", why, "use transform=hadamard")
    if transform.wants_r3(shape):
        why = "vLLM turns no queries and keys"
        _refuse(f"transform.r3={transform.r3}", why, "set transform.r3=off")
    if "o_in" in transform.encodes(shape):
        why = "a mix of heads is no block Hadamard matrix"
        _refuse("transform.online_heads=true", why, "set transform.online_heads=false")
    return transform, {"down_in": set(shape.widths_of("down_in").values())}


def _unserved(shape: ModelShape, orders: Mapping[str, set[int]]) -> Iterator[str]:
    """Why vLLM would not run, or not as it was evaluated, what stands at those sites."""
    structure = shape.structure
    if structure is None:
        return
    if structure.architecture not in FAMILIES:
        yield (
            f"model_type={structure.architecture}: vLLM leaves out, without a word, what stands "
            "before routed experts and before linears that it calls otherwise than the file; only "
            f"{', '.join(FAMILIES)} have neither"
        )
    for layer, sites in enumerate(structure.sites):
        for site in sites:
            found = orders.get(site.name)
            if not found:
                continue
            for matrix in site.matrices:
                if matrix.quantize and matrix.bias is not None:
                    yield f"{matrix.name} has a bias, which vLLM refuses behind a transform"
            acts = [shape.scheme.part("act", layer, name) for name in site.linears]
            if found & set(FUSED) and any(isinstance(act, NVFP4) for act in acts):
                yield (
                    f"vLLM quantizes the NVFP4 activations of {site.name} by another rule behind "
                    f"blocks of {min(found)} (export=fp_quant holds them)"
                )


def _refuse(field: str, why: str, way_out: str) -> NoReturn:
    raise ConfigError(f"{field} {WITH}: {why}; {way_out}, or use export=harness.")
