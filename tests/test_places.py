"""Where matrices go follows from the settings: places in files, R4, blocks, and activations that an
override leaves float."""

import pytest
from composed import NEAR, divergence
from transformed import run

from harness.config.build import build, option
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Scheme
from harness.transforms import ModelShape, Transform
from harness.transforms.quarot import QuaRot


@pytest.mark.parametrize(
    ("transform", "made", "wanted", "words"),
    [
        (
            "adacodec",
            [],
            ["transform.placement=site"],
            "its placement is stream, this run's is site",
        ),
        ("adacodec", [], ["transform.decoder=tied"], "its decoder is free, this run's is tied"),
        ("spinquant", [], ["transform.r2=false"], "its R2 is True, this run's is False"),
        ("spinquant", [], ["transform.r1=off"], "its R1 is True, this run's is False"),
        ("spinquant", ["transform.r2=false"], [], "its R2 is False, this run's is True"),
    ],
    ids=str,
)
def test_matrices_for_other_places_are_refused(tmp_path, transform, made, wanted, words):
    path = tmp_path / "learned.safetensors"
    run(tmp_path / "a", transform, *made, f"transform.save={path}")
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "b", transform, *wanted, f"transform.load={path}")
    assert run(tmp_path / "c", transform, *made, f"transform.load={path}").status == "done"


@pytest.mark.parametrize(
    ("overrides", "placed"),
    [
        (
            [
                "format=int4",
                "format.weight.group_size=32",
                "format.overrides={down_proj: {act: 16}}",
            ],
            False,
        ),
        (
            ["format=int4", "format.weight.group_size=32", "format.overrides={first_1: {act: 16}}"],
            True,
        ),
        (
            [
                "format=int4",
                "format.weight.group_size=32",
                "format.act.bits=16",
                "format.overrides={down_proj: {act: int8}}",
            ],
            True,
        ),
    ],
    ids=str,
)
def test_r4_goes_where_the_input_of_down_is_quantized(tmp_path, overrides, placed):
    outcome = run(tmp_path, "quarot", "solver=rtn", *overrides)
    assert outcome.status == "done", outcome.error
    assert ("R4" in outcome.metrics["notes"]["rotations"]) == placed


def test_learning_sees_which_activations_stay_float(tmp_path):
    base = ("solver=rtn", "format=int4", "format.weight.group_size=32")
    first = {
        own: run(tmp_path, "spinquant", *base, f"format.overrides={own}").metrics["notes"][
            "held_out_loss"
        ][0]
        for own in ("{}", "{down_proj: {act: 16}}", "{down_proj: {weight: 8}}")
    }
    assert first["{down_proj: {act: 16}}"] < first["{}"]
    assert first["{down_proj: {weight: 8}}"] == first["{}"], (
        "weights stay float while rotations are learned"
    )


@pytest.mark.parametrize(
    "options", [["transform.objective=layer"], ["transform.decoder=ridge"]], ids=str
)
def test_codecs_of_single_sites_see_it_too(tmp_path, options):
    outcome = run(
        tmp_path,
        "adacodec",
        "solver=rtn",
        "transform.placement=site",
        *options,
        "transform.init=hadamard",
        "format.overrides={down_proj: {act: 16}}",
    )
    assert outcome.status == "done", outcome.error
    assert divergence(outcome.metrics, "transformed") < NEAR


def test_a_head_without_a_hadamard_matrix_takes_the_way_out():
    context = ModelShape(
        {"attn_in": 64, "o_in": 92, "mlp_in": 64, "down_in": 64}, 1, 1, 1, 92, Scheme(), 0
    )
    with pytest.raises(ConfigError, match=r"transform\.r2=true.*92.*set transform\.r2=false\.$"):
        QuaRot(r3="off").check(context)
    assert QuaRot(r2=False, r3="off").fit(context, None).merged == {}


def test_codecs_take_blocks_that_divide_the_head():
    settings = {
        k: v
        for k, v in option("transform", "adacodec").items()
        if k not in ("name", "smooth", "save", "load")
    }
    widths, scheme = (
        {"attn_in": 96, "o_in": 96, "mlp_in": 96, "down_in": 160},
        Scheme(act=NVFP4(role="activation")),
    )
    context, codec = (
        ModelShape(widths, 1, 2, 2, 48, scheme, 0),
        build(settings, "transform", Transform),
    )
    codec.check(context)
    assert codec._block(context) == 16
