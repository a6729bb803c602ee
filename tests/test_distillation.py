"""Distillation after solving: the size of a step, the held-out loss, which iterate is taken, what
moves and what stays."""

import json
import math

import pytest
import torch
import zoo
from tuners import LEARNERS, run

import harness
from harness.models.adapter import Adapter
from harness.models.tiny import Tiny
from harness.tune.distill import Moving, floats


def test_a_step_of_adam_is_relative():
    """The first one is the rate, whatever the gradient; its decay is a cosine's."""
    free = torch.zeros(3, requires_grad=True)
    moving = Moving({"a": (free, 1e-3)}, 4)
    for step in range(4):
        free.grad = torch.tensor([1e-4, -7.0, 1e3])
        before = free.detach().clone()
        moving.step()
        wanted = 1e-3 * (1 + math.cos(math.pi * step / 4)) / 2
        assert torch.allclose((free - before).abs(), torch.full((3,), wanted), rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_gain_moves_by_a_share_of_itself(family):
    """A gain of a ten-thousandth holds down a channel ten thousand times as large; gemma's are
    1 + w."""
    added = int(family == "gemma")
    adapter = Adapter(zoo.make("gemma") if added else Tiny().load()[0])
    norm = next(name for name, role in adapter.roles.items() if role.kind == "norm")
    weight = adapter.model.get_submodule(norm).weight
    with torch.no_grad():
        weight[:4] = torch.tensor([1e-4, -1e-4, 0.0, 3.0]) - added
    before = weight.detach().clone() + added
    gain = floats(adapter)[f"{norm}.weight"]
    assert torch.equal(gain.served(), weight)
    moving = Moving({"gain": (gain.free, 0.01)}, 10)
    gain.free.grad = torch.ones_like(gain.free)
    moving.step()
    moved = gain.served() + added
    assert ((moved - before).abs() <= 0.0101 * before.abs() + 1e-7).all()
    assert (moved[3] / before[3]).item() == pytest.approx(math.exp(-0.01), rel=1e-5)
    assert moved[2] == before[2]


@pytest.mark.parametrize("options", LEARNERS, ids=str)
def test_the_divergence_falls(tmp_path, options):
    outcome = run(tmp_path, *options, "tune.steps=24", "eval.perplexity.windows=8")
    assert outcome.status == "done", outcome.error
    before, after = outcome.metrics["notes"]["tune_held_out"]
    assert after < 0.97 * before
    plain = run(tmp_path, "eval.perplexity.windows=8")
    kl = [o.metrics["stages"]["quantized"]["divergence"]["pydoc"]["kl"] for o in (plain, outcome)]
    assert kl[1] < kl[0], "on texts that nothing was chosen by, too"


def test_the_best_iterate_is_taken(tmp_path):
    """A rate that only does harm leaves the solved model, and says so."""
    outcome = run(tmp_path, "tune=scales", "tune.lr=1", "tune.lr_norms=1")
    plain = run(tmp_path)
    assert outcome.metrics["notes"]["tune_best_step"] == 0
    assert any("tune=scales changed nothing" in w for w in outcome.metrics["warnings"])
    assert outcome.metrics["stages"]["quantized"] == plain.metrics["stages"]["quantized"]


@pytest.mark.parametrize(("windows", "last"), (("null", 5), (4, 9)))
def test_the_held_out_loss_is_the_divergence_of_what_is_served(tmp_path, windows, last):
    """In float64, between the untouched model and the exported one, on the last window: of those
    that were solved with, or of as many more after them."""
    export = ["export=harness", f"export.path={tmp_path / 'out'}", "transform=quarot"]
    options = ["tune=scales", "format=w4a4kv4", "format.weight.group_size=32"]
    options.append(f"tune.windows={windows}")
    outcome = run(tmp_path, *options, *export, "transform.r1=12")
    assert outcome.status == "done", outcome.error
    student, tokenizer = harness.load(outcome.metrics["export"]["path"])
    text = (tmp_path / "text" / "train.txt").read_text()
    held = torch.tensor(tokenizer(text).input_ids)[last * 64 : (last + 1) * 64][None]
    with torch.no_grad():
        p = Tiny().load()[0](held).logits.double().log_softmax(-1)
        q = student(held, use_cache=False).logits.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert outcome.metrics["notes"]["tune_held_out"][1] == pytest.approx(kl, rel=1e-4)


def test_what_stays_stays(tmp_path):
    """Embedding and head, which share a matrix; norms move, and only where they are told to."""
    for norms in ("true", "false"):
        outcome = run(
            tmp_path,
            "tune=scales",
            f"tune.norms={norms}",
            "export=harness",
            f"export.path={tmp_path / norms}",
        )
        loaded = dict(harness.load(outcome.metrics["export"]["path"])[0].named_parameters())
        untouched = dict(Tiny().load()[0].named_parameters())
        name = "model.embed_tokens.weight"
        assert torch.equal(loaded[name], untouched[name])
        moved = {
            name
            for name, values in untouched.items()
            if "norm" in name and not torch.equal(values, loaded[name])
        }
        assert len(moved) == (5 if norms == "true" else 0)


def test_figures_of_the_text_it_was_trained_on_are_marked(tmp_path):
    assert "adapted" in run(tmp_path, "tune=scales").metrics["marks"]["pydoc"]
    assert "adapted" not in run(tmp_path).metrics["marks"]["pydoc"]


def test_curves_are_logged(tmp_path):
    outcome = run(tmp_path, "tune=scales")
    lines = (outcome.run.path / "tracking" / "curves.jsonl").read_text().splitlines()
    points = [point for point in map(json.loads, lines) if "tune/loss" in point]
    assert [point["step"] for point in points] == [1, 2, 3, 4]
    held = [point["tune/held_out"] for point in points]
    first, least = outcome.metrics["notes"]["tune_held_out"]
    assert min(first, *held) == least
