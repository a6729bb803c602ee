"""AWQ never chooses worse than no scaling, and its scaling leaves the float function alone."""

import pytest
import torch
from composed import small
from safetensors.torch import load_file

from harness.calibration.block import BlockView
from harness.calibration.stream import Stream
from harness.calibration.subject import quiet
from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Integer, Scheme
from harness.linalg.hadamard import Hadamard
from harness.models.adapter import Adapter
from harness.models.merge import place, swap
from harness.models.tiny import Tiny
from harness.pipeline.build import components
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.solvers import AWQ, RTN, Problem
from harness.solvers.awq import clipped
from harness.transforms import Placement, Rotation

INT4 = Integer(bits=4, granularity="group", group_size=32)
TOKEN = Integer(bits=4, granularity="token", role="activation", symmetric=False)
LOUD = torch.ones(192).index_fill_(0, torch.arange(0, 192, 17), 12.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(act=None, weight=INT4, family="llama", dtype=torch.float32):
    """Block 0 of a tiny model whose first norm lets some channels be loud."""
    model, _ = Tiny(family=family).load()
    model.to(dtype)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(LOUD)
        for name in ("q_proj", "k_proj", "v_proj"):
            model.model.layers[0].self_attn.get_submodule(name).weight.div_(LOUD)
    adapter = Adapter(model)
    swap(adapter)
    ids = torch.randint(256, (6, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stream = Stream(adapter, ids)
    return BlockView(
        adapter, Scheme(weight=weight, act=act), 0, stream, torch.Generator(), quiet
    ), ids


def error(block, solver, site, ratio, scale):
    """The search's own measure of one scale at one site."""
    names = block.sites[site]
    weights = {name: block.weights[name] for name in names}
    scaled = Problem(
        {n: w * scale for n, w in weights.items()}, {n: block.formats[n] for n in names}
    )
    rounded = {n: q.dequantize() / scale for n, q in RTN().solve(scaled).qtensors.items()}
    wanted = block.parent(site, {})
    return float(
        (block.parent(site, rounded, scale if solver.with_act else None) - wanted).square().mean()
    )


@torch.no_grad()
@pytest.mark.parametrize("act", [None, TOKEN], ids=["w4", "w4a4"])
@pytest.mark.parametrize("duo", [False, True], ids=["awq", "duo"])
def test_the_chosen_scale_is_no_worse_than_none(act, duo):
    block, _ = view(act)
    solver, gained = AWQ(duo=duo, gqa="mean"), []
    for site, names in block.sites.items():
        ratio, scale = solver._search(block, site, list(names))
        chosen, none = (
            error(block, solver, site, ratio, scale),
            error(block, solver, site, 0, torch.ones_like(scale)),
        )
        assert chosen <= none
        gained.append(chosen < 0.9 * none)
    assert gained[0], "loud channels are worth scaling"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scaling_leaves_the_float_function_alone(family):
    block, ids = view(family=family, dtype=torch.float64)
    model = block.adapter.model
    before = model(ids).logits
    for seed, site in enumerate(block.sites):
        width = block.inputs(site).shape[1]
        scale = block.share(site, draw(width, seed=seed).double().exp())
        block.merge(site, scale)
        assert (model(ids).logits - before).abs().max() < 1e-8, site
    assert set(block.merged) == set(block.sites)


@torch.no_grad()
def test_a_site_behind_an_encoder_is_left_alone():
    block, _ = view()
    place(block.adapter, Placement(online={(0, "down_in"): Rotation(Hadamard(384))}))
    report = AWQ().prepare(block)
    assert block.scalable("down_in") == "fixed"
    assert set(report) == {"awq_attn_in", "awq_mlp_in"}, (
        "o_in is shared by query heads and skipped by default"
    )


def weighed(weight, format, scales, hessian, groups):
    noise = format.decode(format.encode(weight, scales), scales) - weight
    size = weight.shape[1] // groups
    return torch.stack(
        [
            torch.einsum(
                "oi,ij,oj->o",
                *(
                    noise[:, g : g + size],
                    hessian[g : g + size, g : g + size],
                    noise[:, g : g + size],
                ),
            )
            for g in range(0, weight.shape[1], size)
        ],
        -1,
    )


@pytest.mark.parametrize(
    "format",
    [
        INT4,
        Integer(bits=4, granularity="group", group_size=32, symmetric=False),
        NVFP4(),
        MX(),
        Integer(bits=4, granularity="channel", group_size=None),
    ],
    ids=str,
)
def test_clipping_never_raises_a_groups_error(format):
    weight, x = draw(24, 96) ** 3, draw(400, 96, seed=1) @ draw(96, 96, seed=2)
    hessian = 2 / len(x) * x.T @ x
    start = format.scales(weight)
    found = clipped(weight, format, start, hessian)
    groups = start.scale.shape[-1]
    before, after = (weighed(weight, format, scales, hessian, groups) for scales in (start, found))
    assert (after <= before * (1 + 1e-4) + 1e-6).all()
    assert isinstance(format, MX) or after.sum() < before.sum(), (
        "a power of two has few ways to shrink"
    )


@pytest.mark.parametrize("then", ["rtn", "gptq"])
@pytest.mark.parametrize("transform", ["identity", "quarot", "adacodec", "pca"])
def test_awq_runs_after_any_transform_and_resumes(tmp_path, transform, then):
    quick = ["transform.steps=1", "transform.batch=1"] if transform == "adacodec" else []
    cfg, choices = small(
        tmp_path,
        "solver=awq",
        f"solver.then={then}",
        "solver.grid=4",
        f"transform={transform}",
        *quick,
    )
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    awq = {key for layer in outcome.metrics["layers"] for key in layer if key.startswith("awq_")}
    assert ("awq_attn_in" in awq) == (transform != "pca"), "pca encodes every site"
    outcome.run.block(1).unlink()
    (outcome.run.path / "status.json").unlink()
    again = execute(cfg, choices)
    assert again.metrics["stages"] == outcome.metrics["stages"]


def weights(outcome):
    """Codes and scales of every solved linear, as bytes."""
    blocks = [
        load_file(path) for path in sorted((outcome.run.path / "blocks").glob("*.safetensors"))
    ]
    return {
        (index, name): tensor.view(torch.uint8)
        for index, block in enumerate(blocks)
        for name, tensor in block.items()
        if name.endswith((".codes", ".scale", ".global_scale"))
    }


@pytest.mark.parametrize("then", ["rtn", "gptq"])
def test_a_result_that_is_another_solvers_says_so(tmp_path, then):
    """Encoders before every site and a format that chooses its own ranges leave nothing to AWQ."""
    chosen = ["format=fouroversix", "transform=rht"]
    outcome = execute(*small(tmp_path, "solver=awq", f"solver.then={then}", *chosen))
    assert outcome.status == "done", outcome.error
    found, plain = weights(outcome), weights(execute(*small(tmp_path, f"solver={then}", *chosen)))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in found)
    told = "; ".join(outcome.metrics["warnings"])
    assert "attn_in: an encoder stands before it" in told
    assert f"so this is solver={then}" in told
    assert f"awq changed nothing against {then}" in told


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["format=int4", "format.weight.group_size=16", "transform=rht"],
            ["so it only clips ranges"],
        ),
        (["format=fouroversix", "transform=identity"], ["FourOverSix: it chooses ranges itself"]),
        (
            ["solver.grid=1", "solver.clip=false"],
            ["solver.grid=1 tries none", "awq changed nothing against rtn"],
        ),
        (
            ["format.weight.bits=16", "format.overrides={lm_head: {weight: 4}}"],
            ["(no site is quantized), so it only clips ranges"],
        ),
        (["transform=quarot"], []),
        ([], []),
    ],
    ids=str,
)
def test_it_is_said_what_awq_cannot_do(tmp_path, overrides, words):
    outcome = execute(*small(tmp_path, "solver=awq", "solver.grid=4", *overrides))
    assert outcome.status == "done", outcome.error
    told = [
        warning for warning in outcome.metrics["warnings"] if "awq" in warning or "clip" in warning
    ]
    assert all(any(word in warning for warning in told) for word in words), told
    assert len(told) == len(words)


@pytest.mark.parametrize(
    ("knob", "wrong", "right"),
    [
        ("grid", 0, 7),
        ("grid", 2.5, 1),
        ("duo", "maybe", True),
        ("gqa", "all", "mean"),
        ("clip", 3, False),
        ("with_act", "no", False),
        ("then", "faar", "gptq"),
    ],
)
def test_knobs_are_checked(tmp_path, knob, wrong, right):
    """By the field that the command line has, before any weight; what passes is what solves."""

    def built(value):
        cfg, choices = small(tmp_path, "solver=awq", f"solver.{knob}={value}")
        return components(make_plan(settings(cfg), choices)).solver

    with pytest.raises(ConfigError, match=rf"^solver\.{knob}={wrong}"):
        built(wrong)
    assert getattr(built(right), knob) == right


def test_what_queries_and_keys_are_made_by_keeps_its_range():
    """A group's partial output says nothing of their product."""
    weights = {name: draw(8, 64, seed=i) ** 3 for i, name in enumerate(("query", "other"))}
    x = draw(256, 64, seed=5)
    problem = Problem(weights, dict.fromkeys(weights, INT4), x.T @ x / 128)
    plain = RTN().solve(problem).qtensors
    solved = AWQ().told(frozenset({"query"})).solve(problem).qtensors
    for name, shrunk in (("query", False), ("other", True)):
        same = torch.equal(solved[name].scales.scale, plain[name].scales.scale)
        assert same != shrunk
