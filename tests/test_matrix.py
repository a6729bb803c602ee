"""Which transforms, formats, solvers and caches compose: every legal pair runs end to end on the
tiny model, every other is refused before a weight is loaded with both fields and a way out, and
what is doubtful is warned of in the result."""

import json
import math

import pytest
import torch
from composed import NEAR, ROOT, divergence, small
from hydra.utils import get_class
from safetensors.torch import save_file

from harness.calibration.subject import StreamedModel
from harness.config.build import option, settings
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import fuse_norms, swap
from harness.models.tiny import Tiny
from harness.pipeline.build import components
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.transforms import Blocks, ModelShape, Placement
from harness.transforms.learn import Descent, end_to_end
from harness.transforms.quarot import QuaRot

TRANSFORMS = sorted(path.stem for path in (ROOT / "conf" / "transform").glob("*.yaml"))
END_TO_END = {"spinquant", "spinquant_paper", "adacodec", "adacodec_paper", "learned_rotation"}
AFFINE = {"flatquant", "block_affine"}
QUICK = {name: ["transform.steps=2", "transform.batch=1"] for name in END_TO_END | AFFINE} | {
    name: ["transform.r1.epochs=1"] for name in ("dartquant", "jointquant", "jq_seed")
}
# matrices that amplify what is rounded, untrained; decoders that learn the text, another model
AWAY = {"fast_food", "adacodec_paper"}
ROTATED = ["quarot", "spinquant", "dartquant", "jointquant"]
FORMATS = {"nvfp4": [], "mxfp4": [], "int4": ["format.weight.group_size=32"]}


def run(tmp_path, transform, *overrides):
    cfg, choices = small(tmp_path, f"transform={transform}", *QUICK.get(transform, []), *overrides)
    return execute(cfg, choices)


def events(outcome, name):
    lines = (outcome.run.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


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
    "transform", ["spinquant", "dartquant", "adacodec", "pca", "wush", "flatquant"]
)
def test_learned_matrices_are_the_same_bits_for_the_same_seed(tmp_path, transform):
    first, again, _ = (
        run(
            tmp_path / name,
            transform,
            f"transform.save={tmp_path / name}.safetensors",
            f"seed={seed}",
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.metrics["stages"] == again.metrics["stages"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    if transform in ("spinquant", "dartquant", "flatquant"):
        assert (tmp_path / "a.safetensors").read_bytes() != (
            tmp_path / "c.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("transform", ["spinquant", "adacodec", "pca", "wush", "jointquant"])
def test_saved_matrices_loaded_elsewhere_give_the_same_model(tmp_path, transform):
    path = tmp_path / "learned.safetensors"
    first = run(tmp_path / "a", transform, f"transform.save={path}")
    loaded = run(tmp_path / "b", transform, f"transform.load={path}")
    assert loaded.metrics["stages"] == first.metrics["stages"]
    assert [event["source"] for event in events(loaded, "placement")] == [str(path)]
    assert loaded.metrics["run_id"] != first.metrics["run_id"]


def test_what_is_learned_again_invalidates_the_blocks_solved_under_it(tmp_path):
    """Blocks hold weights in the learned basis: other matrices under the same settings must not
    meet them."""
    first = run(tmp_path, "dartquant")
    (stored,) = (tmp_path / "runs" / "_shared" / "placements").glob("*.safetensors")
    other = run(tmp_path / "other", "dartquant", "seed=1")
    (foreign,) = (tmp_path / "other" / "runs" / "_shared" / "placements").glob("*.safetensors")
    stored.write_bytes(foreign.read_bytes())
    again = run(tmp_path, "dartquant", "eval.perplexity.windows=3")
    assert again.metrics["quant_id"] == first.metrics["quant_id"] != other.metrics["quant_id"]
    assert [event["index"] for event in events(again, "block")] == [0, 1], "solved anew"


def test_a_damaged_placement_is_learned_again(tmp_path):
    first = run(tmp_path, "pca")
    (stored,) = (tmp_path / "runs" / "_shared" / "placements").glob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:100])
    again = run(tmp_path, "pca", "solver=rtn")
    assert again.status == "done", again.error
    assert [event["source"] for event in events(again, "placement")] == ["learned"]
    assert first.status == "done"


def test_saving_is_done_for_a_stored_result_too(tmp_path):
    run(tmp_path, "pca")
    kept = tmp_path / "late.safetensors"
    assert run(tmp_path, "pca", f"transform.save={kept}").status == "done"
    assert kept.is_file()


def test_rotations_on_demand_beside_loaded_ones(tmp_path):
    path = tmp_path / "learned.safetensors"
    run(tmp_path / "a", "spinquant", f"transform.save={path}")
    loaded = run(
        tmp_path / "b",
        "spinquant",
        f"transform.load={path}",
        "format.kv.bits=4",
        "transform.r4=off",
    )
    assert loaded.metrics["notes"]["rotations"] == ["R1", "R2", "R3"]


def test_rotations_in_spinquants_layout(tmp_path):
    def orthogonal(n):
        return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[
            0
        ].contiguous()

    path = tmp_path / "rotations.safetensors"
    save_file(
        {
            "R1": orthogonal(192),
            **{f"model.layers.{i}.self_attn.R2": orthogonal(32) for i in range(2)},
        },
        path,
    )
    outcome = run(
        tmp_path,
        "spinquant",
        f"transform.load={path}",
        "format=int4",
        "format.weight.group_size=32",
    )
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"]["gate"]["max"] < 1e-4


def test_a_loss_that_is_not_finite_stops_learning():
    model, _ = Tiny().load()
    adapter = Adapter(model)
    swap(adapter)
    fuse_norms(adapter)
    model.lm_head.weight.data[3] = 3e38  # overflows to infinity, whose softmax is not a number
    subject = StreamedModel(adapter, torch.arange(128).view(2, 64))
    start, scheme = {"R1": torch.eye(192)}, Scheme(act=NVFP4(role="activation"))
    with pytest.raises(
        FloatingPointError, match=r"lm loss is nan in step 1 of 3: lower transform\.lr"
    ):
        end_to_end(
            subject, scheme, start, lambda m: Placement(Blocks(m["R1"])), Descent(3, 1, 0.1), "lm"
        )


REFUSED = [
    ("adacodec", ["format.act.bits=16"], ["format.act.bits=16", "transform=adacodec"]),
    (
        "adacodec",
        ["format=int4", "format.act.bits=16"],
        ["format.act.bits=16", "transform=adacodec"],
    ),
    (
        "spinquant",
        ["format.act.bits=16"],
        ["format.act.bits=16", "format.kv.bits=16", "transform=spinquant"],
    ),
    (
        "spinquant",
        ["format.act.bits=16", "format.kv.bits=4", "transform.r2=false"],
        ["format.act.bits=16", "format.kv.bits=4"],
    ),
    (
        "dartquant",
        ["format.act.bits=16"],
        ["format.act.bits=16", "format.kv.bits=16", "transform=dartquant"],
    ),
    (
        "jointquant",
        ["format.act.bits=16"],
        ["format.act.bits=16", "format.kv.bits=16", "transform=jointquant"],
    ),
    (
        "adacodec",
        ["transform.decoder=ridge"],
        ["transform.decoder=ridge", "transform.placement=stream"],
    ),
    (
        "adacodec",
        ["transform.objective=layer"],
        ["transform.objective=layer", "transform.placement=stream"],
    ),
    ("adacodec", ["transform.block_size=128"], ["transform.block_size=128", "192"]),
    (
        "adacodec",
        ["transform.optimizer=cayley_adam"],
        ["transform.max_angle", "transform.optimizer=cayley_adam"],
    ),
    ("adacodec", ["transform.lr=fast"], ["transform.lr=fast"]),
    (
        "spinquant",
        ["transform.r1=off", "transform.r2=false"],
        ["transform.r1=off", "transform.r2=false"],
    ),
    ("spinquant", ["transform.save=5"], ["transform.save=5"]),
    ("spinquant", ["transform.save=/proc/nowhere/r.safetensors"], ["transform.save=/proc/nowhere"]),
    ("smoothquant", ["transform.sites=o_in"], ["transform.sites=o_in"]),
    ("smoothquant", ["transform.sites=[]"], ["transform.sites=[]"]),
    ("quarot", ["transform.online_heads=true"], ["transform.online_heads=true", "6"]),
    ("quarot", ["transform.r1=7"], ["transform.r1=7", "192"]),
    ("quarot", ["transform.r1=6"], ["transform.r1=6"]),
    ("quarot", ["transform.r4=maybe"], ["transform.r4=maybe"]),
    ("quarot", ["transform.r3=0"], ["transform.r3=0"]),
    ("quarot", ["transform.r3=7"], ["transform.r3=7", "32"]),
    ("quarot", ["transform.smooth={alpha: 2}"], ["transform.smooth.alpha=2"]),
    (
        "quarot",
        ["transform.smooth={alpha: 0.5, sites: [attn_in]}"],
        ["transform.smooth.sites", "transform.smooth.when=before"],
    ),
    (
        "quarot",
        ["transform.smooth={when: after, sites: [down_in]}"],
        ["transform.smooth.sites", "transform.smooth.when=after"],
    ),
    (
        "pca",
        ["transform.smooth={alpha: 0.5, when: after}"],
        ["transform.smooth.when=after", "transform=pca"],
    ),
    (
        "flatquant",
        ["format=int4", "format.act.bits=16", "format.weight.bits=16", "solver=none"],
        ["format.act.bits=16", "format.weight.bits=16", "transform=flatquant"],
    ),
    ("flatquant", ["transform.objective=lm"], ["transform.objective=lm", "block, kd"]),
    ("block_affine", ["transform.block_size=128"], ["transform.block_size=128", "64"]),
    ("smoothquant", ["transform.alpha=1.5"], ["transform.alpha=1.5"]),
    ("smoothquant", ["transform.sites=[head_in]"], ["transform.sites", "head_in"]),
    ("pca", ["transform.block=7"], ["transform.block=7", "attn_in"]),
    ("residual", ["format.act.bits=16"], ["format.act.bits=16", "transform=residual"]),
    ("residual", ["format=fp8_static"], ["granularity=tensor", "transform=residual"]),
    ("residual", ["transform.channels=24"], ["transform.channels=24", "attn_in", "16"]),
    (
        "pca",
        ["transform.post_hadamard=true", "transform.block=6"],
        ["transform.post_hadamard=true"],
    ),
    ("hadamard", ["transform.block_size=128"], ["transform.block_size=128", "64"]),
    ("quarot", ["+transform.load=here.safetensors"], ["transform.load", "transform=quarot"]),
    ("spinquant", ["transform.load=/nowhere.safetensors"], ["transform.load=/nowhere.safetensors"]),
    ("identity", ["format.kv.bits=4", "format.kv.group_size=7"], ["format.kv.group_size", "32"]),
    ("identity", ["format.kv.bits=3.5"], ["format.kv.bits"]),
    ("dartquant", ["transform.schedule=eager"], ["transform.schedule=eager", "joint"]),
    ("dartquant", ["transform.r1_targets=[gate]"], ["transform.r1_targets", "gate"]),
    ("dartquant", ["transform.r1_targets=[]"], ["transform.r1_targets=[]"]),
    ("dartquant", ["transform.r1.momentum=2"], ["transform.r1.momentum=2"]),
    ("dartquant", ["transform.r1=hadamard"], ["transform.r1=hadamard"]),
    ("jointquant", ["transform.r2.steps_per_epoch=0"], ["transform.r2.steps_per_epoch=0"]),
    ("jointquant", ["+transform.r2.rate=1"], ["transform.r2.rate"]),
    ("identity", ["format=int4", "format.weight.group_size=null"], ["group_size", "granularity"]),
    ("smoothquant", ["solver=awq"], ["solver=awq", "smoothquant"]),
    ("quarot", ["solver=awq", "transform.smooth={alpha: 0.5}"], ["solver=awq", "smoothquant"]),
    ("identity", ["solver=adascale", "format=fouroversix"], ["solver=adascale", "FourOverSix"]),
    (
        "identity",
        ["solver.scales=dynamic", "format.overrides={down_proj: mxfp8}"],
        ["solver.scales=dynamic", "static"],
    ),
    (
        "identity",
        ["format=auto", "format.auto.bits_per_weight=1.5"],
        ["format.auto.bits_per_weight=1.5", "2 bits"],
    ),
    (
        "identity",
        ["format=auto", "format.overrides={decoder: mxfp4}"],
        ["format.auto", "format.overrides"],
    ),
    (
        "identity",
        ["solver=adascale", "solver.lwc=false", "solver.flexround=false"],
        ["solver.lwc", "solver.flexround"],
    ),
    (
        "identity",
        ["solver=signround", "solver.rounding=interval"],
        ["solver.clip=true", "solver.rounding=interval"],
    ),
    ("identity", ["format=int4", "format.act.range=static"], ["range=static", "granularity=token"]),
]


@pytest.mark.parametrize(
    ("transform", "overrides", "names"), REFUSED, ids=lambda value: str(value)[:60]
)
def test_what_cannot_work_is_refused(tmp_path, transform, overrides, names):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, transform, *overrides)
    for name in names:
        assert name in str(caught.value)
    assert not (tmp_path / "runs").exists(), "nothing was written"


def test_a_width_without_a_hadamard_matrix_is_refused(tmp_path):
    """13696 = 107 * 128 of Qwen's first models."""
    widths = {"attn_in": 4096, "o_in": 4096, "mlp_in": 4096, "down_in": 13696}
    context = ModelShape(widths, 32, 32, 32, 128, Scheme(), 0)
    with pytest.raises(ConfigError, match=r"transform\.r4=on.*13696.*transform\.r4=off"):
        QuaRot(r4="on").check(context)
    assert QuaRot(r4="off").check(context) == []


def test_a_rotation_of_another_model_is_refused(tmp_path):
    path = tmp_path / "learned.safetensors"
    run(tmp_path / "a", "pca", f"transform.save={path}")
    with pytest.raises(ConfigError, match=r"transform\.load=.*its model is tiny-llama"):
        run(tmp_path / "b", "pca", f"transform.load={path}", "model.family=qwen2")


WARNED = [
    ("identity", ["format=int4", "format.weight.group_size=32"], "outlier channels"),
    ("hadamard", ["solver=rtn"], "worse than identity"),
    ("hadamard", ["solver=rtn", "format.overrides={lm_head: mxfp8}"], "worse than identity"),
    ("identity", ["solver=minmax"], "this is rtn"),
    ("identity", ["solver=minmax", "format=int8", "format.weight.symmetric=false"], "this is rtn"),
    ("identity", ["solver=minmax", "format=int8", "format.weight.int_scale=aimet"], "this is rtn"),
    ("identity", ["solver.scales=dynamic", "format=int8"], "this is scales=static"),
    (
        "quarot",
        ["format=int8", "transform.r1=off", "transform.r2=false", "transform.r4=off"],
        "this is transform=identity",
    ),
    (
        "identity",
        ["solver=adascale", "solver.iterations=0"],
        "adascale changed nothing against minmax",
    ),
    ("identity", ["solver=faar", "solver.steps=0"], "signround changed nothing against rtn"),
    ("pca", ["format=int4", "format.weight.group_size=32"], "post_hadamard"),
    ("pca", ["format=mxfp4"], "MXFP4"),
    ("pca", ["format=mxfp8"], "with MXFP8"),
    *[(transform, [], "NVFP4") for transform in ROTATED],
    ("smoothquant", [], "NVFP4"),
    ("smoothquant", ["format=mxfp4"], "MX"),
    ("hadamard", ["transform.block_size=16", "format=mxfp4"], "smaller than the format's group"),
    ("wush", ["transform.block_size=16", "format=mxfp4"], "smaller than the format's group"),
]
SILENT = [
    ("identity", []),
    ("hadamard", ["solver=gptq"]),
    ("adacodec", []),
    ("quarot", ["format=mxfp4"]),
    ("pca", ["format=int4", "format.weight.group_size=32", "transform.post_hadamard=true"]),
    ("pca", []),
    ("wush", []),
    ("residual", []),
    ("flatquant", ["format=int4", "format.weight.group_size=32"]),
    ("block_affine", []),
    ("dct", []),
    ("quarot", ["format=int4", "format.weight.group_size=32", "format.kv.bits=4"]),
]


@pytest.mark.parametrize(("transform", "overrides", "words"), WARNED, ids=str)
def test_what_is_doubtful_is_warned_of(tmp_path, transform, overrides, words):
    warnings = run(tmp_path, transform, *overrides).metrics["warnings"]
    assert any(words in warning for warning in warnings), warnings


@pytest.mark.parametrize(("transform", "overrides"), SILENT, ids=str)
def test_what_is_sound_is_not(tmp_path, transform, overrides):
    assert run(tmp_path, transform, *overrides).metrics["warnings"] == []


@pytest.mark.parametrize(
    "options",
    [
        ["format=int8", "solver.scales=dynamic"],
        ["format=int8", "solver=minmax", "format.weight.symmetric=false"],
    ],
    ids=str,
)
def test_what_is_said_to_be_another_is(tmp_path, options):
    """The plain solver, on the same format, gives the same figures of every linear."""
    told, plain = (
        run(tmp_path, "identity", *options),
        ["solver=rtn"] if "solver=minmax" in options else [],
    )
    other = run(tmp_path, "identity", *[o for o in options if not o.startswith("solver")], *plain)
    assert other.metrics["run_id"] != told.metrics["run_id"]
    assert other.metrics["layers"] == told.metrics["layers"]


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


def test_a_lost_model_comes_with_a_checklist(tmp_path, capsys):
    from harness.report.table import run_table

    metrics = run(tmp_path, "identity").metrics
    del metrics["records"]  # as in a result of before there were any: the stages say all
    run_table(metrics, tmp_path)
    assert "norm weights" not in capsys.readouterr().out, "this model was never any good"
    metrics["stages"]["baseline"]["ppl"]["pydoc"] = 9.0
    run_table(metrics, tmp_path)
    assert "norm weights not fused" in capsys.readouterr().out
    assert math.isfinite(metrics["stages"]["quantized"]["ppl"]["pydoc"])
    for lost in (math.nan, math.inf, None):
        metrics["stages"]["quantized"]["ppl"]["pydoc"] = lost
        run_table(metrics, tmp_path)
        assert "norm weights not fused" in capsys.readouterr().out
