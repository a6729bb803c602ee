"""format=auto: the program finds the best choice, the sensitivities are output errors, and a run
stays in its budget."""

import itertools

import pytest
import torch
from composed import small

from harness.config.errors import ConfigError
from harness.formats import NVFP4, Integer
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.quantize.allocation import Auto, allocate, auto_of, sensitivities


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [int(w) for w in torch.randint(100, 1000, (count,), generator=generator)]
    sensitivity = torch.rand(count, generator=generator).tolist()
    return [
        {
            "weights": w,
            "errors": {b: s * 4.0**-b for b in (2, 3, 4, 6)},
            "bits": {b: b * w for b in (2, 3, 4, 6)},
        }
        for w, s in zip(weights, sensitivity)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.0, 3.3, 4.1, 6.0])
def test_no_choice_within_the_budget_is_better(seed, budget):
    table = rows(6, seed)
    total = sum(row["weights"] for row in table)

    def error(choice):
        return sum(row["errors"][c] for row, c in zip(table, choice))

    def bits(choice):
        return sum(row["bits"][c] for row, c in zip(table, choice)) / total

    chosen = allocate(table, budget)
    assert bits(chosen) <= budget * (1 + 1e-6)
    best = min(
        (c for c in itertools.product((2, 3, 4, 6), repeat=6) if bits(c) <= budget), key=error
    )
    assert error(chosen) == pytest.approx(error(best), rel=1e-4)


def test_a_budget_below_everything_is_refused():
    with pytest.raises(ConfigError, match=r"format\.auto\.bits_per_weight=1\.5.*2\.000"):
        allocate(rows(3, 0), 1.5)


def test_sensitivity_is_the_output_error_weighed_by_squared_gradients():
    adapter = Adapter(Tiny().load()[0])
    swap(adapter)
    ids = torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0))
    candidates = {"a": NVFP4(), "b": Integer(bits=3, granularity="group", group_size=64)}
    table = sensitivities(adapter, Auto(4.5, candidates), ids, lambda: None)
    assert len(table) == 14
    read, wrote = {}, {}

    def keep(name):
        def hook(_, args, y):
            read[name].append(args[0].detach()[0])
            wrote[name].append(y.requires_grad_() if y.is_leaf else y)
            wrote[name][-1].retain_grad()

        return hook

    names = ("self_attn.k_proj", "mlp.down_proj")
    for name in names:
        read[name], wrote[name] = [], []
        adapter.blocks[1].get_submodule(name).register_forward_hook(keep(name))
    for row in ids:
        logits = adapter.model(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    for name in names:
        row = next(row for row in table if (row["layer"], row["name"]) == (1, name))
        weight = adapter.blocks[1].get_submodule(name).weight
        fisher = torch.stack([y.grad[0].square().sum(0) for y in wrote[name]]).sum(0)
        for key, format in candidates.items():
            noise = torch.cat(read[name]) @ (format.quantize(weight).dequantize() - weight).T
            assert row["errors"][key] == pytest.approx(
                float(2 * noise.square().mean(0) @ fisher), rel=1e-3
            )
            assert row["bits"][key] == format.quantize(weight).bits()


@pytest.mark.parametrize("solver", ["rtn", "gptq", "awq", "minmax"])
def test_a_run_stays_in_its_budget_and_a_sweep_measures_once(tmp_path, solver):
    measured = []
    for budget in (4.0, 5.0):
        quick = ["solver.grid=2"] if solver == "awq" else []
        cfg, choices = small(
            tmp_path,
            "format=auto",
            f"format.auto.bits_per_weight={budget}",
            f"solver={solver}",
            *quick,
        )
        outcome = execute(cfg, choices)
        assert outcome.status == "done", outcome.error
        assert outcome.metrics["bits_per_weight"] <= budget
        assert sum(outcome.metrics["notes"]["allocation"].values()) == 14
        measured.append(outcome.metrics["notes"]["allocation"])
    assert measured[0] != measured[1]


def test_what_is_named_by_hand_stays(tmp_path):
    cfg, choices = small(
        tmp_path, "format=auto", "format.overrides={down_proj: int8}", "solver=rtn"
    )
    outcome = execute(cfg, choices)
    down = [layer for layer in outcome.metrics["layers"] if "down_proj" in layer["name"]]
    assert len(down) == 2
    assert all(layer["bits"] / layer["weights"] >= 8 for layer in down)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"bits_per_weight": 4, "candidates": ["nvfp4"]}, "at least two"),
        ({"bits_per_weight": 4, "candidates": ["nvfp4", "int9"]}, "int9"),
        ({"bits_per_weight": 4, "candidates": ["nvfp4", "nvfp5"]}, "nvfp5"),
        ({"bits_per_weight": 4, "candidates": ["nvfp4", "none"]}, "none"),
        ({"bits_per_weight": "x", "candidates": ["nvfp4", "int4"]}, "bits_per_weight"),
    ],
    ids=str,
)
def test_bad_candidates_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        auto_of(section, {})
