"""Propagated errors: the closed form against least squares, and a run that goes on as it began."""

import shutil
from dataclasses import replace

import pytest
import torch
from composed import run

from harness.config.errors import ConfigError
from harness.formats import Integer
from harness.models.tiny import Tiny
from harness.pipeline import ids
from harness.solvers import Problem
from harness.solvers.propagation import compensated

INT4 = Integer(granularity="group", group_size=32)
QEP = ["solver.propagate=qep", "solver.stream=both", "solver.hessian_input=quantized"]


def drawn(tokens=400, width=64, rows=24):
    """A problem of activations a that ought to be x_f, and both, float64 but for the weights."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=random, dtype=torch.float64)
    a = x + 0.3 * torch.randn(tokens, width, generator=random, dtype=torch.float64)
    weight = torch.randn(rows, width, generator=random, dtype=torch.float64)
    hessian = 2 / tokens * a.T @ a
    drift = 2 / tokens * (x - a).T @ a
    return Problem({"w": weight}, {"w": INT4}, hessian, drift=drift), x, a


def test_undamped_it_is_least_squares():
    problem, x, a = drawn()
    moved = compensated(problem, alpha=1.0, damp=0.0).weights["w"]
    wanted = torch.linalg.lstsq(a, x @ problem.weights["w"].T).solution.T
    torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_a_share_of_it_is_so_far_on_the_way(alpha):
    problem, _, _ = drawn()
    weight = problem.weights["w"]
    whole = compensated(problem, 1.0, 0.3).weights["w"]
    some = compensated(problem, alpha, 0.3).weights["w"]
    torch.testing.assert_close(some - weight, alpha * (whole - weight))


def test_damping_is_a_price_on_moving():
    """The minimum of |a W'^T - x_f W^T|^2 2/N + damp mean(diag H) |W' - W|^2."""
    problem, x, a = drawn()
    weight = problem.weights["w"]
    assert problem.hessian is not None
    price = 0.7 * problem.hessian.diagonal().mean()
    moved = compensated(problem, 1.0, 0.7).weights["w"].requires_grad_()
    fit = (a @ moved.T - x @ weight.T).square().sum() * 2 / len(a)
    (fit + price * (moved - weight).square().sum()).backward()
    assert moved.grad is not None
    assert moved.grad.abs().max() < 1e-9 * price


def test_without_drift_or_with_features_that_are_off_nothing_moves():
    problem, _, _ = drawn()
    assert problem.drift is not None
    for drift in (None, torch.zeros_like(problem.drift)):
        alone = compensated(replace(problem, drift=drift), 1.0, 1.0)
        assert torch.equal(alone.weights["w"], problem.weights["w"])
    off = torch.zeros(64, 64, dtype=torch.float64)
    still = compensated(Problem(problem.weights, problem.formats, off, drift=off), 1.0, 0.0)
    assert torch.equal(still.weights["w"], problem.weights["w"])


def test_fewer_tokens_than_features_are_damped_until_there_is_a_factor():
    """Undamped, H has none: of all exact solutions it is near the one that moves least."""
    problem, x, a = drawn(tokens=10)
    moved = compensated(problem, 1.0, 0.0).weights["w"]
    weight = problem.weights["w"]
    least = weight + (x @ weight.T - a @ weight.T).T @ torch.linalg.pinv(a).T
    assert (moved - least).norm() < 0.2 * (least - weight).norm()


def files(outcome):
    return {
        path.name: path.read_bytes() for path in sorted((outcome.run.path / "blocks").iterdir())
    }


@pytest.mark.parametrize(
    "solver",
    [
        ["solver=gptq", "solver.order=activation"],
        ["solver=gptq", "solver.order=activation", "solver.propagate=gptaq"],
        ["solver=gptq", "transform=adacodec", "transform.steps=2"],
        ["solver=rtn", "format.weight.observer=hessian"],
        ["solver=awq", "solver.grid=3"],
    ],
    ids=["gptq", "gptaq", "adacodec", "rtn", "awq"],
)
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, solver):
    settings = ["format=nvfp4", *QEP, *solver]
    whole = run(tmp_path / "a", *settings)
    assert whole.status == "done", whole.error
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (last,) = (tmp_path / "b").rglob("blocks/0001.safetensors")
    last.unlink()
    for path in (tmp_path / "b").rglob("metrics.json"):
        path.unlink()
    again = run(tmp_path / "b", *settings)
    assert again.status == "done", again.error
    assert files(again) == files(whole)
    assert again.metrics["stages"]["quantized"] == whole.metrics["stages"]["quantized"]


@pytest.mark.parametrize("solver", ["gptq", "awq"])
def test_weights_and_activations_on_disk_give_the_same(tmp_path, solver):
    for part in Tiny().load():
        part.save_pretrained(tmp_path / "model")
    settings = ["format=int4", "format.weight.group_size=32", f"solver={solver}", *QEP]
    settings += ["model=hf", f"model.path={tmp_path / 'model'}"]
    one, other = (
        run(
            tmp_path / where,
            *settings,
            f"model.weights={where}",
            f"data.calibration.activations={where}",
        )
        for where in ("memory", "disk")
    )
    assert len(files(one)) >= 2 and files(one) == files(other)


def test_what_arrives_at_the_end_is_nearer_to_the_untouched_model(tmp_path):
    """Errors are measured against the untouched model's activations, block after block."""

    def divergence(*settings):
        outcome = run(
            tmp_path, "format=int4", "format.weight.group_size=32", "solver=gptq",
            "eval.perplexity.corpora=[data]", "data.calibration.windows=16", *settings,
        )  # fmt: skip
        assert outcome.status == "done", outcome.error
        return outcome.metrics["stages"]["quantized"]["divergence"]["pydoc"]["kl"]

    plain = divergence("solver.stream=both", "solver.hessian_input=quantized")
    assert divergence(*QEP) < plain
    assert divergence(*QEP, "solver.propagate=gptaq") < plain


def test_what_came_later_leaves_ids_alone():
    before = {"name": "gptq", "damp": 0.01, "min_tokens": 128}
    section = before | {
        "stream": "weights", "propagate": "none", "propagate_alpha": 0.5, "propagate_damp": 1.0,
        "propagate_skip": ["down_in"],
    }  # fmt: skip
    assert ids.of_solver(section) == {"name": "gptq", "damp": 0.01}
    assert ids.of_solver(section | {"propagate_alpha": 1.0}) == ids.of_solver(section)
    moving = section | {"propagate": "qep"}
    assert ids.of_solver(moving) != ids.of_solver(section)
    assert ids.of_solver(moving | {"propagate_alpha": 1.0}) != ids.of_solver(moving)
    assert ids.of_solver(section | {"stream": "both"}) != ids.of_solver(section)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["solver.sequencing=block"], "sequencing"),
        (["solver.propagate_skip=[nowhere]"], "nowhere"),
        (["solver.propagate_alpha=2"], "propagate_alpha"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, "format=nvfp4", "solver=gptq", "solver.propagate=qep", *settings)


def test_sites_left_out_are_solved_as_they_are(tmp_path):
    both = ["format=nvfp4", "solver=gptq", "solver.stream=both"]
    all_sites = "[attn_in,o_in,mlp_in,down_in]"
    out = run(tmp_path, *both, "solver.propagate=qep", f"solver.propagate_skip={all_sites}")
    without = run(tmp_path, *both)
    assert out.metrics["run_id"] != without.metrics["run_id"]
    assert out.metrics["stages"]["quantized"] == without.metrics["stages"]["quantized"]
