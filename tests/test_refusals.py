"""What cannot compose is refused before a weight is loaded, with both fields and a way out."""

import pytest
from transformed import run

from harness.config.errors import ConfigError
from harness.formats import Scheme
from harness.transforms import ModelShape
from harness.transforms.quarot import QuaRot

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
