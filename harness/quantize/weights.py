"""Solved weights: out of a block's file, into the model, and what they cost its output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from harness.calibration.statistics import Statistics
from harness.formats import Format, QTensor, Scheme
from harness.models.adapter import Adapter
from harness.models.quant_linear import QuantLinear
from harness.store import Run


def swap_in(
    linears: Mapping[str, QuantLinear],
    names: Mapping[str, str],
    qtensors: Mapping[str, QTensor],
    statistics: Statistics,
    act: Format | None,
    global_scale: Tensor | None,
    counts: bool,
    origins: Mapping[str, Tensor] | None = None,
) -> dict[str, dict]:
    """Load the dequantized weights of one site.

    Returns {linear: report} with the relative output error on the sample: against what the
    untouched model makes of these rows, where that was watched.

    origins: what acts on them there, where that is not the linears' own weights.
    counts: report bits and weights of linears that stay float too.
    """
    sample = statistics.sample
    reports = {}
    inputs = sample
    if act is not None:
        twice = next(iter(linears.values())).site.twice  # they share it
        inputs = act.fake(sample, global_scale=global_scale, twice=twice)
    for name, linear in linears.items():
        report = reports[name] = {"name": names[name], "sqnr_db": None}
        acting = linear.weight if origins is None else origins[name]
        reference = statistics.reference @ acting.float().T
        if name in qtensors:
            values = qtensors[name].dequantize()
            report["sqnr_db"] = decibel(relative(values, linear.weight))
            linear.load(values)
        if counts:
            if name in qtensors:
                bits = qtensors[name].bits()
            else:
                bits = 8 * linear.weight.element_size() * linear.weight.numel()
            report |= {"bits": linear.held(bits), "weights": linear.weight.numel()}
        # of the layer as it runs: weights and activations quantized
        report["rel_error"] = relative(inputs @ linear.weight.float().T, reference)
    return reports


def stored(tensors: Mapping[str, Tensor], name: str, format: Format, weight: Tensor) -> QTensor:
    """The QTensor of one weight among a block's tensors, on the weight's device."""
    prefix = f"{name}."
    state = {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    # an offloaded weight is on no device while its block is not in use
    device = "cpu" if weight.is_meta else weight.device
    return QTensor.from_state(format, state, weight.shape, weight.dtype).to(device)


def relative(values: Tensor, reference: Tensor) -> float:
    """|v - r|^2 / |r|^2 of values v and a reference r, a plain ratio."""
    reference = reference.float()
    noise = (values.float() - reference).square().sum()
    # a reference of zeros has a finite error too
    return float(noise / reference.square().sum().clamp_min(1e-30))


def decibel(noise: float) -> float | None:
    """Signal to noise of a relative error; None where it has no finite value."""
    return -10 * math.log10(noise) if 0 < noise < math.inf else None


class Solved(Mapping[str, QTensor]):
    """{absolute name: QTensor} of all quantized weights of a run.

    Read block by block as they are asked for.
    """

    def __init__(self, adapter: Adapter, scheme: Scheme, run: Run):
        self._block = lambda index: solved(adapter, scheme, run, index)
        self._where = {
            name: index
            for index in range(len(adapter.blocks) + scheme.outside)
            for name in self._block(index)
        }
        # one block at a time in memory: who goes by the names' order reads each block once
        self._latest: tuple[int, dict[str, QTensor]] = (-1, {})

    def __getitem__(self, name: str) -> QTensor:
        index = self._where[name]
        if self._latest[0] != index:
            self._latest = (index, self._block(index))
        return self._latest[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def solved(adapter: Adapter, scheme: Scheme, run: Run, index: int) -> dict[str, QTensor]:
    """{absolute name: QTensor} of a solved block.

    index: one after the last is what stands outside the blocks. Where the run is tuned, a tuner's
    tensors stand in for the solver's.
    """
    record = run.load_block(index)
    structure = adapter.structure
    if record is None:
        return {}
    tensors, _ = record
    if run.tuned:
        changed, _ = run.load_part(f"{index:04d}.{run.tuned}") or ({}, {})
        tensors = tensors | changed
    if index < len(adapter.blocks):
        layer = index
        names = [name for site in adapter.sites(index) for name in site.linears]
    else:
        layer = None
        names = [structure.embedding, structure.head]
    qtensors = {}
    for name, format in scheme.weights(layer, names).items():
        absolute = name if layer is None else adapter.name(index, name)
        # without a solver, only activation scales were taken
        if any(key.startswith(f"{name}.codes") for key in tensors):
            weight = adapter.model.get_submodule(absolute).weight
            qtensors[absolute] = stored(tensors, name, format, weight)
    return qtensors
