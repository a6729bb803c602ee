"""Settings that nothing reads are warned of, what an option is cannot be set."""

import pytest
import torch
from composed import small

from harness.config.build import settings
from harness.config.errors import ConfigError
from harness.formats import MX, NVFP4, FourOverSix, Integer, KVCache
from harness.pipeline.build import components
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan


def warnings(tmp_path, *overrides):
    cfg, choices = small(tmp_path, *overrides)
    found = components(make_plan(settings(cfg), choices, overrides)).warnings
    return [warning for warning in found if "has no effect" in warning]


@pytest.mark.parametrize(
    ("overrides", "key", "why"),
    [
        (["format.kv.clip_k=0.9"], "format.kv.clip_k", "format.kv.bits=16"),
        (
            ["format.act.bits=16", "format.act.observer=mse"],
            "format.act.observer",
            "format.act.bits=16",
        ),
        (["format.weight.mse.grid=50"], "format.weight.mse.grid", "NVFP4 as it is set"),
        (
            ["format.weight.fixed_decode_scale=0.25"],
            "format.weight.fixed_decode_scale",
            "NVFP4 as it is set",
        ),
        (
            ["format=int4", "format.weight.incl0=never"],
            "format.weight.incl0",
            "Integer as it is set",
        ),
        (
            ["format=int4", "++format.act={int_scale: aimet}", "format.act.int_scale=aimet"],
            "format.act.int_scale",
            "Integer",
        ),
        (["solver=rtn", "solver.hessian_input=fp"], "solver.hessian_input", "RTN as it is set"),
        (["format.act.bits=16", "solver.stream=both"], "solver.stream", "format.act.bits=16"),
        (["solver.propagate_alpha=1"], "solver.propagate_alpha", "GPTQ as it is set"),
        (
            ["solver=adascale", "solver.sequencing=block"],
            "solver.sequencing",
            "AdaScale as it is set",
        ),
        (
            ["solver=signround", "solver.hessian_input=fp"],
            "solver.hessian_input",
            "SignRound as it is set",
        ),
        (
            ["solver=adascale", "+solver.propagate_alpha=1"],
            "solver.propagate_alpha",
            "AdaScale as it is set",
        ),
        (
            [
                "transform=adacodec",
                "transform.placement=site",
                "transform.decoder=ridge",
                "transform.lr=1",
            ],
            "transform.lr",
            "AdaCodec as it is set",
        ),
        (["tracking.entity=me"], "tracking.entity", "tracking.wandb=false"),
        (
            ["export=compressed_tensors", "export.serves.weight.scale_dtype=fp16"],
            "export.serves.weight.scale_dtype",
            "format=nvfp4",
        ),
        (
            ["format=none", "solver=none", "data.calibration.order=random"],
            "data.calibration.order",
            "nothing to calibrate",
        ),
        (["solver.min_tokens=64"], "solver.min_tokens", "a model that has no routed experts"),
        (
            ["data.calibration.experts=all"],
            "data.calibration.experts",
            "a model that has no routed experts",
        ),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_a_warning(tmp_path, overrides, key, why):
    (warning,) = warnings(tmp_path, *overrides)
    assert warning.startswith(f"{key} has no effect with {why}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["format.kv.bits=16", "tracking=local", "tracking.wandb=false"],
        ["format.kv.bits=4", "format.kv.clip_k=0.9"],
        ["format.weight.observer=mse", "format.weight.mse.grid=50"],
        ["solver.hessian_input=fp", "solver.sequencing=block"],
        ["format.weight.global_scale=fixed", "format.weight.fixed_decode_scale=0.25"],
        [
            "format=int4",
            "format.weight.group_size=32",
            "export=compressed_tensors",
            "export.serves.weight.scale_dtype=bf16",
        ],
        ["tracking=local", "format=int8", "eval=zeroshot"],
        [
            "format.act.bits=16",
            "format.act.fp4_ties=away",
            "format.overrides={down_proj: {act: 4}}",
        ],
    ],
    ids=str,
)
def test_a_setting_that_is_read_is_not(tmp_path, overrides):
    assert warnings(tmp_path, *overrides) == []


@pytest.mark.parametrize(
    ("cls", "own", "others"),
    [
        (NVFP4, {}, {"fixed_decode_scale": 0.5, "mse_on_rounded_scale": True, "mse": {"grid": 7}}),
        (
            NVFP4,
            {"global_scale": "none", "role": "activation"},
            {"scope": "token", "fixed_decode_scale": 0.5},
        ),
        (NVFP4, {"global_scale": "fixed", "role": "activation"}, {"scope": "token"}),
        (FourOverSix, {}, {"fixed_decode_scale": 0.5, "mse_on_rounded_scale": True}),
        (MX, {"mx_scale": "ceil"}, {"mx_even_mbits": 1}),
        (
            Integer,
            {},
            {
                "zp_order": "add_then_round",
                "zp_range": "signed",
                "incl0": "never",
                "mse": {"norm": 1.0},
            },
        ),
        (Integer, {"symmetric": False}, {"int_scale": "half_range", "int_range": "narrow"}),
        (
            Integer,
            {"symmetric": False, "zp": "float_offset"},
            {"zp_order": "add_then_round", "zp_range": "signed"},
        ),
    ],
    ids=str,
)
def test_what_a_format_does_not_read_changes_no_bit(cls, own, others):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    assert set(others) <= set(cls(**own).unread)
    for name, value in others.items():
        assert torch.equal(cls(**own, **{name: value}).fake(x), cls(**own).fake(x)), name


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ({"symmetric": True}, {"incl0": "never", "zp_order": "add_then_round"}),
        ({"symmetric": True}, {"zp_range": "signed"}),
        ({"zp": "float_offset"}, {"zp_order": "add_then_round", "zp_range": "signed"}),
        ({"kind": "fp8", "bits": 8, "scale": "unit"}, {"group_size": 32, "clip_k": 0.5}),
        ({"kind": "mxfp4", "scale": "unit"}, {"scale": "dynamic", "clip_v": 0.5}),
    ],
    ids=str,
)
def test_what_a_cache_does_not_read_changes_no_bit(own, others):
    x = torch.randn(1, 2, 8, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    assert set(others) <= set(KVCache(**own).unread)
    for name, value in others.items():
        other = KVCache(**own | {name: value})
        for part in ("key", "value"):
            assert torch.equal(other.fake(x, part), KVCache(**own).fake(x, part)), name


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("solver.name=rtn", "solver.name=rtn: is no setting"),
        ("format.name=int4", "format.name=int4"),
        ("eval.name=full", "eval.name=full"),
        ("transform.name=5", "transform.name=5"),
        ("export.name=harness", "export.name=harness"),
        (
            "solver._target_=harness.solvers.gptq.GPTQ",
            "solver._target_=harness.solvers.gptq.GPTQ: the class is no setting",
        ),
        ("format.act={_target_: harness.formats.FP4}", "format.act"),
        ("data.name=5", "data.name=5: needs a word"),
        ("model.name=5", "model.name=5: needs a word or null"),
        ("+export.path=elsewhere", "export.path: no such setting"),
        ("+solver.nope=1", "solver.nope"),
        ("+eval.zeroshot={tasks: [agreement], nope: 1}", "eval.zeroshot.nope"),
        ("+format.kv.nope=1", "format.kv.nope"),
        ("+transform.save=5", "transform.save=5: needs a word or null"),
        ("++export.scale_dtype=foo", "export.scale_dtype: no such setting"),
        ("++export.serves={weight: {scale_dtype: foo}}", "export.serves.weight.scale_dtype=foo"),
        ("++export.serves={act: {nope: input}}", "export.serves.act.nope"),
    ],
    ids=str,
)
def test_what_an_option_is_and_what_it_has_not_cannot_be_set(tmp_path, override, named):
    cfg, choices = small(tmp_path, override)
    with pytest.raises(ConfigError) as refused:
        execute(cfg, choices, overrides=[override])
    assert named in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_stored_result_is_shown_with_the_warning(tmp_path):
    untouched = ["format=none", "solver=none"]
    cfg, choices = small(tmp_path, *untouched)
    assert execute(cfg, choices, overrides=untouched).metrics["warnings"] == []
    cfg, choices = small(tmp_path, *untouched, "data.calibration.windows=3")
    again = execute(cfg, choices, overrides=[*untouched, "data.calibration.windows=3"])
    assert again.stored
    assert again.metrics["warnings"] == [
        "data.calibration.windows has no effect with nothing to calibrate"
    ]
