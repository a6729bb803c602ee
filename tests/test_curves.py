"""What a run logs while it learns: a point a step in the tracker's files, in families with steps of
their own."""

import json
import math

import pytest
from composed import small
from test_tracking import needs_wandb, records, without_login

from harness.pipeline.job import execute
from harness.tracking.replay import Record

SHORT = ["transform.steps=6", "transform.batch=1"]
LEARNERS = {
    "spinquant": (["transform=spinquant", *SHORT], "learn/loss", 6),
    "adacodec-kd": (["transform=adacodec", *SHORT], "learn/loss", 6),
    "adacodec-lm": (["transform=adacodec", "transform.objective=lm", *SHORT], "learn/loss", 6),
    "learned_rotation": (["transform=learned_rotation", *SHORT], "learn/loss", 6),
    "adacodec-layer": (
        ["transform=adacodec", "transform.placement=site", "transform.objective=layer", *SHORT],
        "learn/loss",
        6 * 2 * 4,
    ),  # sites of both blocks, one after another
    "dartquant-r1": (["transform=dartquant", "transform.r1.batch=16"], "r1/whip", None),
    "dartquant-r2": (["transform=dartquant", "transform.r2.batch=16"], "r2/whip", None),
    "jointquant-r1": (["transform=jointquant", "transform.r1.epochs=3"], "r1/whip", None),
    "jointquant-r2": (["transform=jointquant", "transform.r2.epochs=3"], "r2/whip", None),
    "adascale": (["solver=adascale", "solver.iterations=5", "format=int4"], "adascale/loss", 5 * 2),
    "signround": (["solver=signround", "solver.steps=5"], "signround/loss", 5 * 2),
}


def curve(outcome, name: str) -> list[tuple[int, float]]:
    """Every point of a curve in the order in which the run logged it."""
    lines = (outcome.run.path / "tracking" / "curves.jsonl").read_text().splitlines()
    return [(point["step"], point[name]) for point in map(json.loads, lines) if name in point]


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_learner_logs_a_point_a_step(tmp_path, learner):
    overrides, name, steps = LEARNERS[learner]
    rest = [] if overrides[0].startswith("solver=") else ["solver=rtn"]
    outcome = execute(*small(tmp_path, *rest, *overrides))
    assert outcome.status == "done", outcome.error
    points = curve(outcome, name)
    assert [step for step, _ in points] == list(range(1, (steps or len(points)) + 1))
    assert len(points) > 1 and all(math.isfinite(value) for _, value in points)
    notes = outcome.metrics["notes"]
    if name == "r1/whip":
        assert len(points) == notes["r1_steps"]
    if "train_loss" in notes:
        assert [points[0][1], points[-1][1]] == notes["train_loss"]
        held = [value for _, value in curve(outcome, "learn/held_out")]
        assert min(held + notes["held_out_loss"][:1]) == notes["held_out_loss"][1]
    blocks = [step for step, _ in curve(outcome, "block/rel_error")]
    assert blocks == [0, 1], "learning steps are none of the blocks' axis"


def test_the_loss_of_a_block_continues_behind_the_block_before(tmp_path):
    outcome = execute(*small(tmp_path, "solver=adascale", "solver.iterations=5", "format=int4"))
    held = curve(outcome, "adascale/held_out")
    assert [step for step, _ in held] == list(range(1, 11))
    for index in range(2):
        before, after = (
            curve(outcome, f"block/{key}")[index][1] for key in ("loss_before", "loss_after")
        )
        assert min(
            before, *(value for _, value in held[5 * index : 5 * index + 5])
        ) == pytest.approx(after)


def test_matrices_from_the_store_are_not_learned_again(tmp_path):
    first = execute(*small(tmp_path, "transform=dartquant", "solver=rtn"))
    again = execute(*small(tmp_path, "transform=dartquant", "solver=gptq"))
    assert curve(first, "r1/whip") and not curve(again, "r1/whip")


def test_head_and_embedding_are_no_blocks(tmp_path):
    overrides = "format.overrides={lm_head: 8, embed_tokens: int8}"
    outcome = execute(*small(tmp_path, "format=int4", "solver=rtn", overrides))
    layers = {layer["name"]: layer for layer in outcome.metrics["layers"]}
    assert [step for step, _ in curve(outcome, "block/rel_error")] == [0, 1]
    for name, where in (("lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        for key in ("rel_error", "sqnr_db"):
            assert curve(outcome, f"outside/{name}/{key}") == [(0, layers[where][key])]


@needs_wandb
def test_every_family_has_its_own_axis_in_wandb(tmp_path, monkeypatch):
    without_login(monkeypatch, tmp_path)
    overrides = [
        "tracking=wandb",
        "tracking.mode=offline",
        "transform=dartquant",
        "solver=rtn",
        "format=int4",
        "format.overrides={lm_head: 8}",
    ]
    outcome = execute(*small(tmp_path, *overrides))
    assert outcome.status == "done", outcome.error
    found = records(outcome.run.path, outcome.run.path.name)
    axes = {
        metric["glob_name"]: metric["step_metric"]
        for metric in found["metric"]
        if "glob_name" in metric
    }
    assert axes == {f"{family}/*": f"{family}/index" for family in ("r1", "r2", "block", "outside")}
    history = [record["item"] for record in found["history"]]
    for family in ("r1", "r2", "block", "outside"):
        steps = [item[f"{family}/index"] for item in history if f"{family}/index" in item]
        logged = [
            step
            for step, values in Record.read(outcome.run).curves
            if any(k.startswith(f"{family}/") for k in values)
        ]
        assert steps == logged and steps
