"""What a layout cannot hold is refused before any work; what a transform says stays online, by
which that is known, is what does."""

import pytest
import torch
from exported import run

from harness.calibration.subject import StreamedModel
from harness.config.build import option
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Scheme
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import fuse_norms, swap
from harness.models.tiny import Tiny
from harness.pipeline.transforms import transforms_of


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["export=compressed_tensors", "transform=hadamard"],
            ["transform=hadamard", "export=harness"],
        ),
        (
            ["export=compressed_tensors", "transform=quarot"],
            ["transform=quarot", "transform.r4=off"],
        ),
        (["export=compressed_tensors", "transform=pca"], ["transform=pca", "export=harness"]),
        (
            ["export=compressed_tensors", "transform=adacodec"],
            ["transform=adacodec", "export=harness"],
        ),
        (["export=compressed_tensors", "format=fp4"], ["format.weight", "export=harness"]),
        (["export=harness", "format=none", "solver=none"], ["format=none", "export=none"]),
        (["export=harness", "export.dataset=open-math"], ["export.dataset=open-math"]),
        (["export=harness", "export.push_to=me/model"], ["export.push_to=me/model"]),
        (
            ["export=compressed_tensors", "format.act.compute_dtype=float32"],
            [
                "format.act.compute_dtype=float32",
                "export=compressed_tensors",
                "set format.act.compute_dtype=input",
            ],
        ),
        (
            ["export=compressed_tensors", "format=int8", "format.act.zp_order=round_then_add"],
            ["format.act.zp_order=round_then_add", "set format.act.zp_order=add_then_round"],
        ),
        (
            ["export=compressed_tensors", "format=int8", "format.act.zp_range=unsigned"],
            ["format.act.zp_range=unsigned", "set format.act.zp_range=signed"],
        ),
        (
            ["export=compressed_tensors", "format=int8", "format.act.scale_dtype=bf16"],
            ["format.act.scale_dtype=bf16"],
        ),
        (
            [
                "export=compressed_tensors",
                "format=w4a4kv4",
                "format.kv.clip_k=1",
                "format.kv.clip_v=1",
                "format.kv.compute_dtype=float32",
            ],
            ["format.kv.compute_dtype=float32", "set format.kv.compute_dtype=input"],
        ),
        *[
            (
                ["export=harness", *more, f"export.{part}={value}"],
                [f"export.{part}={value}", "letters", "shorter"],
            )
            for more, part, value in (
                ([], "base", "b" * 300),
                ([], "dataset", "d" * 300),
                ([], "peft", f"LoRa{'1' * 300}"),
                (["export.base=short"], "dataset", "d" * 220),
            )
        ],
        (
            ["export=harness", f"export.path={'p' * 300}"],
            ["export.path=ppp", "too long", "another folder"],
        ),
    ],
    ids=str,
)
def test_what_a_layout_cannot_hold_is_refused_before_any_work(tmp_path, settings, words):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, *settings)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r4": "off"},
        {"r3": "on", "r4": "off"},
        {"r1": "random"},
        {"name": "hadamard"},
        {"name": "pca"},
        {"name": "pca", "head": False},
        {"name": "smoothquant"},
        {"name": "identity"},
        {"name": "adacodec", "steps": 1},
        {"name": "adacodec", "steps": 1, "placement": "merged"},
        {"name": "adacodec", "steps": 1, "placement": "site"},
    ],
    ids=str,
)
def test_what_a_transform_says_stays_online_is_what_does(settings):
    adapter = Adapter(Tiny().load()[0])
    swap(adapter)
    name = settings.get("name", "quarot")
    (transform,) = transforms_of(option("transform", name) | settings | {"name": name})
    gains = fuse_norms(adapter) if transform.residual else None
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    context = shape_of(adapter.structure, Scheme(act=NVFP4(role="activation")))
    placement = transform.fit(context, StreamedModel(adapter, tokens, gains=gains))
    assert bool(transform.leaves(context)) == bool(placement.online or placement.query_key)
