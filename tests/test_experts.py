"""The experts of a layer: solved at once as one by one, and on which tokens."""

from dataclasses import replace

import pytest
import torch
import zoo
from composed import done, small
from test_gptq import FORMATS, N, draw, hessian, inputs, loss

from harness.calibration.stream import ENOUGH
from harness.calibration.windows import tokenize
from harness.config.build import option
from harness.formats import Integer, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import byte_tokenizer
from harness.pipeline import ids as ids_of_runs
from harness.pipeline.job import execute
from harness.quantize.blocks import quantize
from harness.solvers import GPTQ, RTN, Problem, Solution, Solver
from harness.solvers.awq import AWQ
from harness.store import Run


def experts(format, count=5, rows=(24, 8)) -> list[Problem]:
    """Problems of one shape, each with its own activations."""
    problems = []
    for expert in range(count):
        weights = {
            f"{name}.{expert}": draw(out, N, seed=100 * expert + out)
            for name, out in zip(("gate", "up"), rows)
        }
        h = hessian(inputs(tokens=400, seed=expert))
        problems.append(Problem(weights, dict.fromkeys(weights, format), h))
    return problems


def agreement(one: Solution, other: Solution) -> float:
    """The least share of equal codes of any weight."""
    assert list(one.qtensors) == list(other.qtensors)
    return min(
        float((q.codes == other.qtensors[name].codes).float().mean())
        for name, q in one.qtensors.items()
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order, scales", [
    ("default", "static"), ("activation", "static"), ("default", "dynamic"),
])  # fmt: skip
def test_experts_at_once_are_solved_as_one_by_one(name, order, scales):
    """But for the last bits of sums, which may turn a code that is nearly between two."""
    solver = GPTQ(order=order, scales=scales)
    problems = experts(FORMATS[name])
    for problem, together in zip(problems, solver.solve_together(problems)):
        alone = solver.solve(problem)
        assert agreement(alone, together) > 0.97
        h = problem.hessian
        assert loss(problem, together, h) == pytest.approx(loss(problem, alone, h), rel=0.02)
        assert together.report == alone.report


def test_one_hessian_that_cannot_be_factored_leaves_the_others_alone():
    """It is damped more, or rounded; what another expert gets does not depend on it."""
    problems = experts(FORMATS["nvfp4"])
    solver = GPTQ(damp=0.0)
    sick = hessian(inputs(tokens=10))  # of rank 10: no damping is too little
    hopeless = -torch.eye(N)
    problems[1] = replace(problems[1], hessian=sick)
    problems[3] = replace(problems[3], hessian=hopeless)
    solutions = solver.solve_together(problems)
    assert [each.report["fallback"] for each in solutions] == [None, None, None, "rtn", None]
    assert [each.report["redamped"] for each in solutions] == [False, True, False, False, False]
    rounded = RTN().solve(problems[3])
    assert agreement(rounded, solutions[3]) == 1
    for index in (0, 1, 2, 4):
        assert agreement(solver.solve(problems[index]), solutions[index]) > 0.97


def test_experts_of_several_formats_and_shapes_are_solved_each_by_its_own():
    odd = experts(FORMATS["nvfp4"], count=4)
    other = dict.fromkeys(odd[2].weights, Integer(bits=8, granularity="channel", group_size=None))
    odd[2] = replace(odd[2], formats=other)
    odd += experts(FORMATS["nvfp4"], count=2, rows=(16,))
    for problem, together in zip(odd, GPTQ().solve_together(odd)):
        assert [q.format for q in together.qtensors.values()] == list(problem.formats.values())
        assert agreement(GPTQ().solve(problem), together) > 0.97


@pytest.mark.parametrize("then", ["rtn", "gptq"])
def test_awq_clips_each_expert_by_its_own_hessian(then):
    solver = AWQ(then=then)
    problems = experts(FORMATS["int4_group32"], count=3)
    for problem, together in zip(problems, solver.solve_together(problems)):
        alone = solver.solve(problem)
        assert together.report == alone.report
        assert together.report["clipped"] > 0
        assert agreement(alone, together) > 0.97


def test_the_usual_number_of_tokens_is_one_number():
    """Stored runs are found by leaving it out of their ids, so every place has to mean the same."""
    assert {option("solver", name)["min_tokens"] for name in ("rtn", "gptq", "awq")} == {ENOUGH}
    assert GPTQ().min_tokens == ids_of_runs.MIN_TOKENS == ENOUGH


class Watching(GPTQ):
    """GPTQ that notes what it is given at once."""

    def solve_together(self, problems):
        self.__dict__.setdefault("seen", []).append(problems)
        return super().solve_together(problems)


@torch.no_grad()
def solved(tmp_path, solver: Solver, enough: int | None, ids: torch.Tensor) -> list[dict]:
    """The reports of all linears of the tiny Mixtral's experts."""
    adapter = Adapter(zoo.make("mixtral"))
    swap(adapter)
    layers = []
    quantize(
        adapter,
        Scheme(weight=FORMATS["int4_group32"]),
        solver,
        ids,
        Run(tmp_path),
        lambda index, reports, output: layers.extend(reports),
        enough=enough,
    )
    return [layer for layer in layers if "routed" in layer]


def ids(count=4, length=64):
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sequencing", ["sites", "block"])
def test_all_experts_of_a_layer_come_at_once(tmp_path, sequencing):
    solver = Watching(sequencing=sequencing)
    layers = solved(tmp_path, solver, 1, ids())
    sizes = [len(problems) for problems in solver.seen if len(problems) > 1]
    assert sizes == [4, 4] * 3  # what experts read, and what is within, of three layers
    assert len(layers) == 4 * 2 * 3
    assert not any(layer["every"] for layer in layers)


def test_few_tokens_are_counted_and_all_are_one_hessian(tmp_path):
    """2 of 4 experts a token: 256 tokens give 512 choices a layer."""
    fed = solved(tmp_path / "fed", GPTQ(), 1, ids())
    for layer in range(3):
        routed = [each["routed"] for each in fed if f"layers.{layer}." in each["name"]]
        assert sum(routed) == 2 * 512  # of both linears
    enough = max(each["routed"] for each in fed[:8])
    starving = solved(tmp_path / "starving", GPTQ(), enough, ids())
    assert [each["every"] for each in starving[:8]] == [each["routed"] < enough for each in fed[:8]]
    solver = Watching()
    everyone = solved(tmp_path / "everyone", solver, None, ids())
    assert all(each["every"] for each in everyone)
    first, within = [problems for problems in solver.seen if len(problems) > 1][:2]
    assert len({id(problem.hessian) for problem in first}) == 1
    assert len({id(problem.hessian) for problem in within}) == 4


def test_a_run_says_which_experts_were_given_too_little(saved_mixtral, tmp_path):
    settings = [*saved_mixtral, "format=int4", "solver=gptq"]
    metrics = execute(*small(tmp_path, *settings, "solver.min_tokens=100000")).metrics
    (said,) = [line for line in metrics["warnings"] if "solver.min_tokens" in line]
    assert said.startswith("24 of 24 linears of experts")
    metrics = execute(*small(tmp_path, *settings, "solver.min_tokens=1")).metrics
    assert not any("solver.min_tokens" in line for line in metrics["warnings"])


def test_experts_that_a_step_gives_no_token_stay_as_they_are(saved_mixtral, tmp_path):
    learned = ["solver=signround", "solver.steps=3", "solver.batch=1"]
    outcome = done(tmp_path, *saved_mixtral, *learned, "data.calibration.length=8")
    text = (tmp_path / "text" / "train.txt").read_text()
    ids = tokenize(byte_tokenizer(), text)[: 3 * 8].view(3, 8)
    model = zoo.make("mixtral")
    idle = 0
    for window in ids:
        for chances in model(window[None], output_router_logits=True).router_logits:
            idle += 4 - len(chances.topk(2).indices.unique())
    assert idle > 0, "an expert of some layer is given no token of a window"
    errors = {layer["name"]: layer["rel_error"] for layer in outcome.metrics["layers"]}
    experts = [error for name, error in errors.items() if ".experts." in name]
    assert len(experts) == 4 * 2 * 3
    assert min(experts) > 0 and max(experts) < 0.1


@pytest.mark.parametrize("transform", ["identity", "quarot"])
def test_a_mixture_in_16_bits_is_held_to_its_own_noise(saved_mixtral, tmp_path, transform):
    """Experts that add up in another order have other last bits, transformed or not."""
    settings = [*saved_mixtral, "model.dtype=bfloat16", "solver=rtn", f"transform={transform}"]
    outcome = execute(*small(tmp_path, *settings))
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] > 0


@pytest.fixture
def saved_mixtral(tmp_path):
    zoo.make("mixtral").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return ["model=hf", f"model.path={tmp_path / 'model'}", "data.bos=none"]
