"""Tuners in whole runs: with every format, solver, transform and model, exported as evaluated; what
cannot be tuned is refused, what changes nothing is told."""

import json
from dataclasses import replace

import pytest
import zoo
from composed import NEAR, ROOT, divergence, small
from tuners import TUNERS, run

from harness.checkpoints.about import held
from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, Integer
from harness.models.tiny import Tiny
from harness.pipeline.build import components
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.tune.scales import LearnedScales

FORMAT_OPTIONS = {
    "nvfp4": [],
    "mxfp4": [],
    "fouroversix": [],
    "int4": ["format.weight.group_size=32"],
    "fp4": [],
    "w4a8kv8": ["format.weight.group_size=32"],
}


@pytest.mark.parametrize("format", FORMAT_OPTIONS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_with_every_format_solver_and_transform(tmp_path, tuner, format):
    exported = ["export=harness", f"export.path={tmp_path / 'out'}"]
    for solver, transform in (("rtn", "hadamard"), ("gptq", "quarot")):
        outcome = run(
            tmp_path,
            f"tune={tuner}",
            f"format={format}",
            f"solver={solver}",
            f"transform={transform}",
            *FORMAT_OPTIONS[format],
            *exported,
        )
        assert outcome.status == "done", outcome.error
        assert 0 < divergence(outcome.metrics) < NEAR
        for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
            assert evaluated == pytest.approx(loaded, rel=1e-9)
        assert outcome.metrics["export"]["weights"] == 14


@pytest.mark.parametrize(
    "options",
    [
        ["solver=awq", "solver.grid=3"],
        ["solver=adascale", "solver.iterations=2"],
        ["solver=minmax"],
        ["transform=adacodec", "transform.steps=2"],
        ["format=auto"],
        ["format.overrides={lm_head: int8, embed_tokens: int8, down_proj: 16}"],
        ["model.tie=false"],
        ["model.family=qwen3"],
        ["model.family=qwen2", "format.kv.bits=4"],
        ["model.dtype=bfloat16"],
        ["model.amp=bfloat16"],
        ["data.calibration.windows=1"],
        ["data.calibration.activations=disk"],
    ],
    ids=str,
)
@pytest.mark.parametrize("codes", ["fixed", "rounded"])
def test_what_else_a_run_may_be(tmp_path, options, codes):
    plain = ["format=int4", "format.weight.group_size=32"]
    if any(o.startswith("format=") for o in options):
        plain = []
    outcome = run(tmp_path, *plain, *options, "tune=scales", f"tune.codes={codes}")
    assert outcome.status == "done", outcome.error
    assert 0 < outcome.metrics["notes"]["tune_held_out"][1] < NEAR
    assert 0 < divergence(outcome.metrics) < NEAR


def test_a_mixture_is_tuned_expert_by_expert(tmp_path):
    zoo.make("mixtral").save_pretrained(tmp_path / "model")
    Tiny().load()[1].save_pretrained(tmp_path / "model")
    model = ["model=hf", f"model.path={tmp_path / 'model'}"]
    export = ["export=harness", f"export.path={tmp_path / 'out'}"]
    for options in (["tune=scales"], ["tune=weights"]):
        outcome = run(tmp_path, *model, *options, *export)
        assert outcome.status == "done", outcome.error
        before, after = outcome.metrics["notes"]["tune_held_out"]
        assert after < before
        for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
            assert evaluated == pytest.approx(loaded, rel=1e-9)


def test_it_is_exported_to_others_as_it_was_evaluated(tmp_path):
    options = ["tune=scales", "tune.lr=0.02", "model.dtype=bfloat16"]
    outcome = run(
        tmp_path, *options, "export=compressed_tensors", f"export.path={tmp_path / 'out'}"
    )
    assert outcome.status == "done", outcome.error
    exported = outcome.metrics["export"]
    assert exported["weights"] == 14
    assert exported["name"] == "tiny-llama-RTN.Scales_wnvfp4_g16_anvfp4_kv16_headfp16"
    about = json.loads((ROOT / exported["path"] / "quantization_metadata.json").read_text())
    assert about["method"]["tune"] == "scales"
    assert held(ROOT / exported["path"])["tune"] == "scales"


def test_encodings_are_those_of_the_tuned_weights(tmp_path):
    int4 = ["format=int4", "format.act.bits=16", "solver=minmax"]
    plain, other = run(tmp_path, *int4), run(tmp_path, *int4, "tune=scales", "tune.lr=0.02")
    texts = [
        sorted(path.read_text() for path in (o.run.path / "min_max_encodings").iterdir())
        for o in (plain, other)
    ]
    assert len(texts[0]) == len(texts[1]) and texts[0] != texts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["tune=scales", "solver=none", "format=none"], ["tune=scales", "solver=rtn"]),
        (["tune=weights", "solver=none", "format.weight.bits=16"], ["tune=weights", "tune=none"]),
        (["tune=scales", "tune.codes=free"], ["tune.codes=free", "fixed, rounded, dual"]),
        (["tune=scales", "tune.steps=-1"], ["tune.steps=-1"]),
        (["tune=scales", "tune.batch=0"], ["tune.batch=0"]),
        (["tune=scales", "tune.lr=2"], ["tune.lr=2"]),
        (["tune=weights", "tune.norms=1"], ["tune.norms=1"]),
        (["tune=scales", "+tune.lrr=1"], ["tune.lrr", "lr"]),
        (["+tune.steps=1"], ["tune.steps"]),
        (
            ["tune=scales", "tune.codes=rounded", "format=fouroversix"],
            ["tune.codes=rounded", "FourOverSix", "tune.codes=fixed"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError) as refused:
        execute(*small(tmp_path, "solver=rtn", *options))
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "runs").exists()


def test_blocks_on_disk_are_refused(tmp_path):
    model, tokenizer = Tiny().load()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    disk = ["model=hf", f"model.path={tmp_path / 'model'}", "model.weights=disk"]
    with pytest.raises(ConfigError, match=r"tune=scales with model\.weights=disk"):
        run(tmp_path, *disk, "tune=scales")


def test_a_rate_that_reaches_no_other_scale_is_told():
    formats = [MX(), NVFP4(), Integer()]
    assert len(LearnedScales(lr=1e-3, steps=200).check(formats)) == 1
    assert "MX" in LearnedScales(lr=1e-3, steps=200).check(formats)[0]
    assert LearnedScales(lr=5e-3, steps=200).check(formats) == []
    assert len(LearnedScales(lr=1e-4, steps=200).check(formats)) == 2


def test_what_is_switched_off_is_not_read(tmp_path):
    cfg, choices = small(tmp_path, "tune=scales", "tune.norms=false", "solver=rtn")
    given = ("tune.norms", "tune.lr_norms", "tune.steps")
    told = components(replace(make_plan(settings(cfg), choices), given=given)).warnings
    assert told == ["tune.lr_norms has no effect with LearnedScales as it is set"]
