"""Routed experts in a compressed-tensors file: one by one, as engines name them.

    mlp.experts.gate_up_proj.3 [2 m, n]  ->  mlp.experts.3.gate_proj [m, n], .up_proj [m, n]

The names, and which rows of a matrix each is, are those of transformers' own conversion turned
round (Matrix.parts); a part has the scales of its rows, and all parts of a matrix its scale of the
whole, if there is one. transformers (5.23) decodes experts while it loads them and runs them in the
model's dtype:

- by one format for all of them, the first whose targets speak of experts;
- of what lies in weight_packed and weight_scale alone. So NVFP4 is held only without a global
  scale (https://github.com/huggingface/transformers/issues/48371: others come back a few hundred
  times too large, without a word), and neither zero points nor codes of one byte each are;
- and quantizes nothing that they read.

What it does with a weight's entries is tried on a small one, so that another release is asked anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import torch

from harness.checkpoints import layouts
from harness.checkpoints.entries import weight_entries
from harness.checkpoints.layouts import WAY_OUT
from harness.config.errors import ConfigError
from harness.formats import Format, Scheme
from harness.libraries.compressed_tensors import expert_loaded
from harness.libraries.saved import Saved
from harness.models.adapter import Adapter
from harness.structure.site import Matrix
from harness.structure.structure import Structure
from harness.transforms import ModelShape

WITH = "with export=compressed_tensors and routed experts"
ROWS = 8


def parts_of(structure: Structure) -> dict[str, tuple[tuple[str, range], ...]]:
    """{name of an expert's linear: its parts in a file, (module, rows) each}."""
    return {
        f"{structure.blocks}.{layer}.{matrix.name}": matrix.parts
        for layer, matrix in _matrices(structure)
    }


def routers(structure: Structure) -> list[str]:
    """The modules whose matrices only choose, and stay float."""
    found = (
        matrix.parameter.removesuffix(".weight")
        for sites in structure.sites
        for site in sites
        for matrix in site.matrices
        if not matrix.quantize and not matrix.experts
    )
    return list(dict.fromkeys(found))


def targets(names: Sequence[str], adapter: Adapter) -> list[str]:
    """What config.json calls the linears of a group.

    Experts by a pattern, for only that tells transformers which group is theirs; as a whole, for
    vLLM asks for their parts by names of its own.
    """
    parts = parts_of(adapter.structure)
    experts = {part.rpartition(".")[0] for name in names for part, _ in parts.get(name, ())}
    patterns = {
        r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in expert.split("."))
        for expert in experts
    }
    plain = Saved(adapter.model).modules(name for name in names if name not in parts)
    return plain + [rf"re:{pattern}\." for pattern in sorted(patterns)]


def refuse_experts(scheme: Scheme, shape: ModelShape, fields: Mapping[Format, str]) -> None:
    """Raise ConfigError, before any weight is loaded, where routed experts would come back as
    others, or not at all. fields: what sets each format.
    """
    structure = shape.structure
    if structure is None:
        return
    _refuse_architecture(structure)
    matrices = list(_matrices(structure))
    for layer, matrix in matrices:
        act = scheme.part("act", layer, matrix.name)
        if act is not None:
            raise ConfigError(
                f"{fields[act]}.bits={act.bits} {WITH}: {_reader()} quantizes nothing that experts "
                f"read; set {fields[act]}.bits=16, {WAY_OUT}."
            )
    formats = {scheme.part("weight", layer, matrix.name) for layer, matrix in matrices}
    if len(formats) > 1:
        raise ConfigError(
            f"format.overrides or format.auto {WITH}: {_reader()} decodes all experts by one "
            f"format, and they have several; give them one, {WAY_OUT}."
        )
    for weight in formats:
        if weight is None:
            raise ConfigError(
                f"format.weight.bits=16 {WITH}: {_reader()} takes experts to be quantized in such "
                f"a file; set format.weight, {WAY_OUT}."
            )
        layouts.refuse(weight, fields[weight])
        _refuse_weight(weight, fields[weight])


def _refuse_architecture(structure: Structure) -> None:
    """Refuse experts that files do not hold as linears of their own, quantized."""
    where = f"export=compressed_tensors with a {structure.architecture}"
    if structure.float_experts:
        raise ConfigError(
            f"{where}: {', '.join(structure.float_experts)} stay float, and {_reader()} takes "
            "experts to be quantized in such a file; use export=harness."
        )
    for _, matrix in _matrices(structure):
        if not matrix.parts or matrix.bias is not None:
            raise ConfigError(
                f"{where}: its files hold no linear for {matrix.name} alone, and the layout has a "
                "place for linears only; use export=harness."
            )


def _refuse_weight(weight: Format, field: str) -> None:
    """Refuse a format that is not read as it is written, tried on a small weight."""
    width = 2 * (weight.group_size or 32)
    q = weight.quantize(torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)))
    wanted = q.dequantize().bfloat16()
    for alone in (False, True):
        kind = layouts.layout(weight, None, alone)
        group = layouts.config_group(weight, None, kind)
        got = expert_loaded(weight_entries(q, kind), group, wanted)
        if got is None or not torch.equal(got, wanted):
            raise ConfigError(
                f"{field}={type(weight).__name__} of {weight.bits} bits {WITH}: {_reader()} "
                "decodes experts from packed codes and their scales, without global scales and "
                "zero points, and would get other weights; take MX of 4 or 6 bits, symmetric "
                f"integers, or NVFP4 with global_scale=none, {WAY_OUT}."
            )


def _reader() -> str:
    return f"transformers {version('transformers')}"


def _matrices(structure: Structure) -> Iterator[tuple[int, Matrix]]:
    """(block, matrix) of all that single experts multiply with."""
    for layer in range(structure.layers):
        for site in structure.expanded(layer):
            if site.expert is not None:
                yield from ((layer, matrix) for matrix in site.matrices)
