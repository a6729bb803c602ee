"""Propagated errors under free decoders: towards what the untouched model makes of its inputs."""

import copy
from dataclasses import replace

import pytest
import torch
from composed import small

from harness.calibration.subject import StreamedModel
from harness.config.errors import ConfigError
from harness.formats import Integer, Scheme
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import fuse_norms, place, swap
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.quantize.blocks import quantize
from harness.quantize.untouched import Untouched
from harness.solvers import RTN, Problem
from harness.solvers.propagation import compensated
from harness.store import Run
from harness.transforms.quarot import QuaRot

F64 = torch.float64
INT4 = Integer(granularity="group", group_size=32)


def drawn(tokens=400, width=64, rows=24):
    """x_f, what an encoder and the stream's errors make of it, W_o and any other W; float64."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=random, dtype=F64)
    encoder = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=F64)).Q
    a = x @ encoder + 0.3 * torch.randn(tokens, width, generator=random, dtype=F64)
    origin, weight = torch.randn(2, rows, width, generator=random, dtype=F64)
    return x, encoder, a, origin, weight


def problem(weight, a, x, origin=None):
    drift = 2 / len(a) * (x - a).T @ a
    origins = None if origin is None else {"w": origin}
    return Problem({"w": weight}, {"w": INT4}, 2 / len(a) * a.T @ a, drift=drift, origins=origins)


def test_undamped_it_is_least_squares_towards_the_untouched_output():
    """Whatever the decoder has made of the weight."""
    x, _, a, origin, weight = drawn()
    moved = compensated(problem(weight, a, x, origin), alpha=1.0, damp=0.0).weights["w"]
    wanted = torch.linalg.lstsq(a, x @ origin.T).solution.T
    torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_damping_is_a_price_on_moving(alpha):
    """alpha of the way to the least |a W'^T - x_f W_o^T|^2 2/N + damp mean(diag H) |W' - W|^2."""
    x, _, a, origin, weight = drawn()
    given = problem(weight, a, x, origin)
    assert given.hessian is not None
    price = 0.7 * given.hessian.diagonal().mean()
    step = (compensated(given, alpha, 0.7).weights["w"] - weight) / alpha
    best = (weight + step).requires_grad_()
    fit = (a @ best.T - x @ origin.T).square().sum() * 2 / len(a)
    (fit + price * (best - weight).square().sum()).backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-9 * price


def test_under_an_orthogonal_encoder_it_is_the_plain_formula():
    x, encoder, a, origin, _ = drawn()
    free = compensated(problem(origin @ encoder, a, x, origin), 0.5, 1.0)
    plain = compensated(problem(origin @ encoder, a, x @ encoder), 0.5, 1.0)
    torch.testing.assert_close(free.weights["w"], plain.weights["w"], rtol=1e-9, atol=1e-9)


def test_a_rotated_model_is_solved_as_it_is_beside_its_own_copy(tmp_path):
    """QuaRot's stream, values and online rotations: the targets of every linear are encoded as its
    outputs are, and two ways to the same function give the same weights."""
    model, _ = Tiny().load()
    before = copy.deepcopy(model)
    # float activations: two that round to either side of a tie would be two models soon
    scheme = Scheme(weight=INT4)
    ids = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))
    solver = RTN(propagate="qep", propagate_alpha=1.0, propagate_damp=0.1, propagate_skip=())

    def solved(solver, beside):
        """{linear: weight} of the first block, and its errors: in later ones a single code that
        rounds the other way has come to many."""
        adapter = Adapter(copy.deepcopy(model))
        swap(adapter)
        gains = fuse_norms(adapter)
        rotation = QuaRot(r3=False, r4=True)
        shape = shape_of(adapter.structure, scheme)
        placement = rotation.fit(shape, StreamedModel(adapter, ids, gains=gains))
        place(adapter, placement)
        untouched = None
        if beside:
            other = Adapter(copy.deepcopy(before))
            swap(other)
            untouched = Untouched(other, [placement])
        errors = []
        run = Run(tmp_path / f"{solver.propagate}{beside}")
        quantize(
            adapter, scheme, solver, ids, run,
            lambda index, layers, output: errors.extend(layers), untouched=untouched,
        )  # fmt: skip
        names = [name for site in adapter.sites(0) for name in site.linears]
        weights = {name: adapter.blocks[0].get_submodule(name).weight for name in names}
        return weights, torch.tensor([error["rel_error"] for error in errors[: len(names)]])

    (one, errors), (other, others) = solved(solver, False), solved(solver, True)
    off, _ = solved(replace(solver, propagate="none"), False)
    for name, weight in one.items():
        moved = (weight - off[name]).norm()
        assert (weight - other[name]).norm() < 0.1 * moved + 1e-4, name
        assert moved > 1 or (name.startswith("self_attn.") and "o_proj" not in name)
    torch.testing.assert_close(errors, others, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["solver=gptq", "solver.propagate=gptaq"], "use solver.propagate=qep"),
        (["solver=awq", "solver.propagate=qep"], "channel scales"),
        (["solver=adascale", "+solver.propagate=qep"], "or solver.propagate=none"),
        (["solver=signround", "+solver.propagate=gptaq"], "or solver.propagate=none"),
    ],
    ids=["gptaq", "awq", "adascale", "signround"],
)
def test_what_it_cannot_do_is_refused(tmp_path, settings, words):
    cfg, choices = small(tmp_path, "format=nvfp4", "transform=adacodec", *settings)
    with pytest.raises(ConfigError, match=words):
        execute(cfg, choices)


def test_nor_is_the_untouched_model_held_where_none_is(tmp_path):
    model, tokenizer = Tiny().load()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cfg, choices = small(
        tmp_path, "model=hf", f"model.path={tmp_path / 'model'}", "model.weights=disk",
        "format=nvfp4", "transform=adacodec", "solver=rtn", "solver.propagate=qep",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="holds the untouched model"):
        execute(cfg, choices)


@pytest.mark.parametrize("placement", ["stream", "site"])
def test_an_adacodec_run_propagates(tmp_path, placement):
    """And its errors are measured against the untouched model, towards which they fall."""

    def errors(*settings):
        cfg, choices = small(
            tmp_path, "format=int4", "format.weight.group_size=32", "transform=adacodec",
            f"transform.placement={placement}", "transform.steps=2", "solver=rtn",
            "solver.stream=both", "data.calibration.windows=16", *settings,
        )  # fmt: skip
        outcome = execute(cfg, choices)
        assert outcome.status == "done", outcome.error
        return [layer["rel_error"] for layer in outcome.metrics["layers"]]

    found = errors("solver.propagate=qep")
    assert all(0 < error < 1 for error in found)
    assert sum(found) < sum(errors("solver.propagate=qep", "solver.propagate_alpha=0"))
