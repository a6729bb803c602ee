"""What is told of solved blocks: their errors as curves and notes, and what is to be doubted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from harness.pipeline.state import LoadedJob


def reported(
    job: LoadedJob, blocks: int, advance: Callable[..., None]
) -> Callable[[int, list[dict], dict], None]:
    """What is done with a block's reports once it is solved: kept, logged, shown."""

    def done(index: int, layers: list[dict], output: dict) -> None:
        job.metrics["layers"] += layers
        errors = [
            math.nan if layer["rel_error"] is None else layer["rel_error"] for layer in layers
        ]
        mean = sum(errors) / len(errors)
        note = f"relative output error {mean:.4f}"
        if index == blocks:  # embedding and head: no block, so no point of its curves
            job.tracker.log(_outside(layers), step=0)
            advance(note)
            return
        points = {"block/rel_error": mean, "block/worst_rel_error": max(errors)}
        points |= {f"block/{key}": value for key, value in output.items() if value is not None}
        first = layers[0]
        if "loss_after" in first:  # of the block, so every layer has it
            points |= {f"block/{key}": first[key] for key in ("loss_before", "loss_after")}
            note += f", loss {first['loss_before']:.4g} to {first['loss_after']:.4g}"
        job.tracker.log(points, step=index)
        advance(note)

    return done


def doubts(layers: Sequence[Mapping]) -> list[str]:
    """Warnings of linears that a solver could not treat as it was told to."""
    warnings = []
    fallbacks = [layer["name"] for layer in layers if layer.get("fallback")]
    if fallbacks:
        warnings.append(
            f"{len(fallbacks)} linears fell back to RTN (singular H): {', '.join(fallbacks)}"
        )
    damped = [layer["name"] for layer in layers if layer.get("redamped")]
    if damped:
        warnings.append(
            f"{len(damped)} linears needed more damping than solver.damp: {', '.join(damped)}"
        )
    return warnings


def starved(layers: Sequence[Mapping], enough: int) -> list[str]:
    """A warning of experts that the router gave too few tokens to calibrate on."""
    experts = [layer for layer in layers if "routed" in layer]
    few = [layer for layer in experts if layer["every"]]
    if not few:
        return []
    least = min(few, key=lambda layer: layer["routed"])
    return [
        f"{len(few)} of {len(experts)} linears of experts were calibrated on all tokens of their "
        f"layer, for the router gave them fewer than solver.min_tokens={enough} (fewest: "
        f"{least['routed']}, {least['name']})"
    ]


def _outside(layers: Sequence[Mapping]) -> dict:
    """{"outside/lm_head/rel_error": ..} of what stands outside the blocks."""
    measured = {layer["name"].rpartition(".")[2]: layer for layer in layers}
    return {
        f"outside/{name}/{key}": layer[key]
        for name, layer in measured.items()
        for key in ("rel_error", "sqnr_db")
        if layer.get(key) is not None
    }
