"""Which transforms, formats, solvers and caches compose: every legal pair runs end to end on the
tiny model. Every other is refused (test_refusals.py), what is doubtful is warned of
(test_warnings.py)."""

import math

import pytest
import torch
from composed import NEAR, divergence, small
from events import events
from hydra.utils import get_class
from transformed import QUICK, ROTATED, TRANSFORMS, run

from harness.calibration.subject import StreamedModel
from harness.config.build import option, settings
from harness.models.adapter import Adapter
from harness.models.merge import fuse_norms, swap
from harness.models.tiny import Tiny
from harness.pipeline.build import components
from harness.pipeline.plan import make_plan

# matrices that amplify what is rounded, untrained; decoders that learn the text, another model
AWAY = {"fast_food", "adacodec_paper"}
FORMATS = {"nvfp4": [], "mxfp4": [], "int4": ["format.weight.group_size=32"]}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_with_every_format_and_solver(tmp_path, transform, format):
    learned = []
    for solver in ("rtn", "gptq"):
        outcome = run(tmp_path, transform, f"format={format}", f"solver={solver}", *FORMATS[format])
        assert outcome.status == "done", outcome.error
        assert 0 < divergence(outcome.metrics) < (math.inf if transform in AWAY else NEAR)
        learned += [event["source"] for event in events(outcome, "placement")]
    learns = get_class(option("transform", transform)["_target_"]).learned
    assert learned == (["learned", "store"] if learns else []), (
        "another solver reuses what was learned"
    )


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["transform.init=hadamard"],
        ["transform.init=pca"],
        ["transform.placement=site"],
        ["transform.placement=merged"],
        ["model.family=qwen3"],
    ],
    ids=str,
)
def test_codecs_that_have_learned_nothing_leave_the_model(tmp_path, options):
    stages = run(tmp_path, "adacodec", "solver=rtn", "transform.steps=0", *options).metrics[
        "stages"
    ]
    assert stages["transformed"]["ppl"]["pydoc"] == pytest.approx(
        stages["baseline"]["ppl"]["pydoc"], rel=1e-5
    )


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("transform", ["identity", "quarot"])
@pytest.mark.parametrize("solver", ["adascale", "awq", "faar", "minmax", "signround"])
def test_solvers_that_see_more_than_a_site(tmp_path, solver, transform, bits):
    short = {"adascale": "iterations=2", "awq": "grid=3", "faar": "steps=2", "signround": "steps=2"}
    quick = [f"solver.{short[solver]}"] if solver in short else []
    int4 = ["format=int4", "format.weight.group_size=32", f"format.kv.bits={bits}"]
    outcome = run(tmp_path, transform, f"solver={solver}", *int4, *quick)
    assert outcome.status == "done", outcome.error
    assert 0 < divergence(outcome.metrics) < NEAR


@pytest.mark.parametrize("transform", ["identity", "hadamard", "pca", "wush", *ROTATED, "adacodec"])
def test_every_kind_of_transform_with_a_quantized_cache(tmp_path, transform):
    ppl = {}
    for bits in (16, 8, 4):
        kv = [f"format.kv.bits={bits}", "format=int8"]
        outcome = run(tmp_path, transform, *kv, "solver=rtn")
        assert outcome.status == "done", outcome.error
        ppl[bits] = outcome.metrics["stages"]["quantized"]["ppl"]["pydoc"]
    assert len(set(ppl.values())) == 3
    rotations = outcome.metrics["notes"].get("rotations", [])
    assert ("R3" in rotations) == (transform in ROTATED)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "transform",
    ["quarot", "pca", "wush", "smoothquant", "spinquant", "jointquant", "learned_rotation"],
)
def test_exact_transforms_pass_the_gate_on_every_family(tmp_path, transform, family):
    outcome = run(tmp_path, transform, f"model.family={family}", "format.kv.bits=4")
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


# The held-out loss begins with the start's, and never rises: of these, two steps lower it.
LOWERED = (
    [],
    ["transform.placement=site"],
    ["transform.placement=merged"],
    ["transform.init=pca"],
    ["transform.placement=site", "transform.objective=layer"],
    ["transform.block_size=16"],
    ["format=fouroversix"],
)


@pytest.mark.parametrize(
    "options",
    [
        *LOWERED,
        ["transform.init=hadamard"],
        ["transform.placement=site", "transform.decoder=ridge"],
        ["transform.placement=site", "transform.init=pca"],
        ["transform.objective=lm"],
        ["transform.optimizer=cayley_adam", "transform.max_angle=null"],
        ["format.act.global_scale=fixed"],
        ["model.family=qwen3"],
    ],
    ids=str,
)
def test_every_way_of_adacodec(tmp_path, options):
    outcome = run(tmp_path, "adacodec", *options)
    assert outcome.status == "done", outcome.error
    stages, notes = outcome.metrics["stages"], outcome.metrics["notes"]
    assert "gate" not in notes, "a trained decoder changes the function"
    assert set(stages) == {"baseline", "transformed", "quantized"}
    # a decoder fitted to few tokens is off without any quantizer, a learned one is not
    learned = "transform.decoder=ridge" not in options
    assert divergence(outcome.metrics, "transformed") < (1e-4 if learned else NEAR)
    assert 0 < divergence(outcome.metrics) < NEAR
    if options in LOWERED:
        before, after = notes["held_out_loss"]
        assert after < before


@pytest.mark.parametrize(
    "options",
    [
        ["transform.r1=random"],
        ["transform.r1=12"],
        ["transform.r1=off"],
        ["transform.r2=false"],
        ["transform.r3=on"],
        ["transform.r4=off"],
        ["transform.random_signs=false"],
        ["transform.smooth={alpha: 0.5, when: before}"],
        ["transform.smooth={alpha: 0.5, when: after}"],
    ],
    ids=str,
)
def test_every_way_of_quarot(tmp_path, options):
    outcome = run(tmp_path, "quarot", "format=int4", "format.weight.group_size=32", *options)
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


@pytest.mark.parametrize(
    "transform", ["identity", "hadamard", "pca", "wush", "residual", "flatquant", "dartquant"]
)
def test_smoothquant_stacks_under_others(tmp_path, transform):
    plain = run(tmp_path, transform, "format=int8")
    outcome = run(tmp_path, transform, "format=int8", "transform.smooth={alpha: 0.6}")
    assert outcome.status == "done", outcome.error
    assert (
        outcome.metrics["stages"]["quantized"]["ppl"] != plain.metrics["stages"]["quantized"]["ppl"]
    )


@pytest.mark.parametrize(
    "options",
    [
        *[[f"transform={name}"] for name in TRANSFORMS],
        ["transform=quarot", "transform.r4=off"],
        ["transform=adacodec", "transform.placement=merged"],
        ["transform=adacodec", "transform.placement=site"],
        ["transform=wush", "transform.merge=true"],
    ],
    ids=str,
)
def test_where_encoders_will_run_is_known_beforehand(tmp_path, options):
    name = options[0].partition("=")[2]
    cfg, choices = small(tmp_path, *options, *QUICK.get(name, []))
    parts, adapter = components(make_plan(settings(cfg), choices)), Adapter(Tiny().load()[0])
    swap(adapter)
    transform = next(each for each in parts.transforms if each.name == name)
    gains = fuse_norms(adapter) if transform.residual else None
    windows = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    placed = transform.fit(parts.context, StreamedModel(adapter, windows, gains=gains))
    online = {
        site
        for site in parts.context.widths
        if any(placed.encoder(layer, site) for layer in range(2))
    }
    assert set(transform.encodes(parts.context)) == online
