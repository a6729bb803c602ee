"""Exports as a run makes them: named, described, loaded back, compared; and nothing half-written
left behind."""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from composed import small
from safetensors import safe_open

import harness
from harness.calibration.subject import StreamedModel
from harness.checkpoints.about import ABOUT, held
from harness.config.build import option
from harness.config.errors import ConfigError
from harness.formats import NVFP4, Scheme
from harness.libraries.compressed_tensors import cache_refusal
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import fuse_norms, swap
from harness.models.source import assert_finite
from harness.models.tiny import Tiny, byte_tokenizer
from harness.pipeline.export import WINDOWS
from harness.pipeline.job import execute
from harness.pipeline.transforms import transforms_of

PLAIN = ["format=nvfp4", "solver=rtn"]
RIGHT = {
    "harness": ["transform=quarot", "format.kv.bits=4"],
    "compressed_tensors": ["transform=quarot", "transform.r4=off"],
}


def run(tmp_path, *settings):
    place = (
        [f"export.path={tmp_path / 'out'}"]
        if any(setting.startswith("export=") for setting in settings)
        else []
    )
    cfg, choices = small(tmp_path, *PLAIN, *place, *settings)
    return execute(cfg, choices, command="python run.py again")


def left(tmp_path) -> list[str]:
    found = (tmp_path / "out").iterdir() if (tmp_path / "out").exists() else []
    return sorted(path.name for path in found if not path.name.endswith(".lock"))


@pytest.mark.parametrize("layout", RIGHT)
def test_a_run_leaves_a_checkpoint_that_is_what_it_evaluated(tmp_path, layout):
    outcome = run(tmp_path, f"export={layout}", *RIGHT[layout])
    assert outcome.status == "done", outcome.error
    (name,) = left(tmp_path)
    folder, found = tmp_path / "out" / name, outcome.metrics["export"]
    assert "_wnvfp4_" in name
    assert found["path"] == str(folder)
    assert found["weights"] == 14
    for evaluated, loaded in found["ppl"].values():
        assert loaded == pytest.approx(evaluated, rel=1e-12 if layout == "harness" else 5e-3)
    about = json.loads((folder / "quantization_metadata.json").read_text())
    assert about["quantized"] == "14/15"
    assert about["run_id"] == outcome.metrics["run_id"]
    card = (folder / "README.md").read_text()
    assert "python run.py again" in card
    assert f"{outcome.metrics['stages']['quantized']['ppl']['pydoc']:.4f}" in card
    assert not [path for path in folder.iterdir() if path.suffix in (".py", ".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("layout", RIGHT)
def test_a_checkpoint_is_measured_as_it_is(tmp_path, layout):
    outcome = run(tmp_path, f"export={layout}", *RIGHT[layout])
    cfg, choices = small(
        tmp_path / "again", "model=checkpoint", f"model.path={outcome.metrics['export']['path']}"
    )
    again = execute(cfg, choices)
    assert again.status == "done", again.error
    known, got = outcome.metrics["stages"]["quantized"], again.metrics["stages"]["baseline"]
    assert again.metrics["bits_per_weight"] is None
    cache = "kv4" if layout == "harness" else ""
    assert again.metrics["holds"] == {
        "format": f"nvfp4-w4a4{cache}",
        "transform": "quarot",
        "solver": "rtn",
    }
    assert "holds" not in outcome.metrics
    if layout == "harness":
        assert got["losses"] == known["losses"]
    assert got["ppl"]["pydoc"] == pytest.approx(
        known["ppl"]["pydoc"], rel=0.03
    )  # one in bfloat16 flips some codes
    cfg, choices = small(
        tmp_path / "again",
        "model=checkpoint",
        f"model.path={outcome.metrics['export']['path']}",
        *PLAIN,
    )
    with pytest.raises(ConfigError, match="measured as it is"):
        execute(cfg, choices)


SERVED = {
    "int8": [],
    "int4": [],
    "nvfp4": [],
    "mxfp4": ["format.act.mx_scale=even"],
    **(
        {"w4a4kv4": ["format.kv.clip_k=1.0", "format.kv.clip_v=1.0"]}
        if cache_refusal() is None
        else {}
    ),
    "int8 in nvfp4": ["format.overrides={down_proj: int8, lm_head: {weight: int8}}"],
    "auto": ["format.auto.candidates=[int3, int8, nvfp4]"],
}


@pytest.mark.parametrize("format", SERVED)
def test_what_is_evaluated_in_bfloat16_is_what_is_served(tmp_path, format):
    """The formats take the rules of whoever loads the file, options named in overrides and
    candidates too."""
    chosen = [f"format={format.split()[-1]}", *SERVED[format]]
    outcome = run(tmp_path, "export=compressed_tensors", "model.dtype=bfloat16", *chosen)
    assert outcome.status == "done", outcome.error
    assert not [warning for warning in outcome.metrics["warnings"] if "served" in warning]
    for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
        assert loaded == evaluated


def test_the_rules_of_an_export_are_part_of_what_is_solved(tmp_path):
    named = ["format=nvfp4", "format.overrides={down_proj: int8}"]
    for settings in (["format=int8"], named):
        ids = {
            run(tmp_path, "model.dtype=bfloat16", *settings, *more).metrics["quant_id"]
            for more in ([], ["export=harness"], ["export=compressed_tensors"])
        }
        assert len(ids) == 2


FLOAT16 = {
    "nvfp4": ([], "bfloat16"),
    "mxfp4": (["format.act.mx_scale=even"], "bfloat16"),
    "int8": ([], "float16"),
    "int4": ([], "float16"),
    "int4 weights": (["format.act.bits=16", "format.weight.symmetric=false"], "float16"),
    "int8 in nvfp4": (["format.overrides={down_proj: int8}"], "bfloat16"),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with a model in float16."""
    folder = tmp_path_factory.mktemp("half") / "tiny-half"
    Tiny().load()[0].half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", FLOAT16)
def test_a_float16_model_comes_back(tmp_path, half, case):
    """Integers in float16, bit for bit; NVFP4 and MX in bfloat16, in which transformers unpacks
    them, after one rounding."""
    settings, dtype = FLOAT16[case]
    format = next(word for word in reversed(case.split()) if word != "weights")
    outcome = run(
        tmp_path,
        "export=compressed_tensors",
        "model=hf",
        f"model.path={half}",
        f"format={format}",
        *settings,
    )
    assert outcome.status == "done", outcome.error
    folder = Path(outcome.metrics["export"]["path"])
    assert folder.name.startswith("tiny-half-")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    with safe_open(folder / "model.safetensors", "pt") as file:
        norms = [name for name in file.keys() if "norm" in name]  # noqa: SIM118
        floats = {file.get_slice(name).get_dtype() for name in norms}
    assert floats == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    exact = (
        1e-4 if torch.cuda.is_available() else 0
    )  # on a GPU the kernel of a product follows from where its operands lie
    for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
        assert loaded == pytest.approx(evaluated, rel=exact if dtype == "float16" else 5e-3)
    warned = [
        warning
        for warning in outcome.metrics["warnings"]
        if "served in bfloat16 and evaluated in float16" in warning
    ]
    assert len(warned) == (dtype == "bfloat16")


def test_a_float16_model_in_our_own_layout_and_that_of_fp_quant(tmp_path, half):
    fixed = [
        "format.weight.global_scale=fixed",
        "format.weight.fixed_decode_scale=0.0009765625",
        "format.act.global_scale=fixed",
        "format.act.fixed_decode_scale=0.125",
    ]
    for settings in (
        ["export=harness"],
        ["export=fp_quant", *fixed],
        ["export=fp_quant", "export.pseudo=true", "format.act.fp4_ties=zero", *fixed],
    ):
        outcome = run(tmp_path, "model=hf", f"model.path={half}", *settings)
        assert outcome.status == "done", outcome.error


@pytest.mark.parametrize("layout", RIGHT)
def test_the_umask_decides_who_may_read(tmp_path, layout):
    before = os.umask(0o027)
    try:
        outcome = run(
            tmp_path,
            f"export={layout}",
            "transform=pca" if layout == "harness" else "transform=identity",
            *([f"transform.save={tmp_path / 'kept.safetensors'}"] if layout == "harness" else []),
        )
    finally:
        os.umask(before)
    assert outcome.status == "done", outcome.error
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "text" not in path.parts]
    assert sum(path.suffix == ".safetensors" for path in written) >= 4
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in written} == {
        path.name: "0o640" for path in written
    }


def about(formats, *bits, **method) -> str:
    parts = dict(
        zip(("weights", "activations", "kv"), ({"format": "int4", "bits": n} for n in bits))
    )
    return json.dumps({"formats": formats, "bits": parts, "method": method})


NOTHING = (None, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            about({"int4": 14}, 4, 16, 16, transform="quarot", solver="gptq"),
            ("int4-w4a16", "quarot", "gptq"),
        ),
        (
            about({"int8": 1, "int4": 14}, 4, 8, 4, transform="pca"),
            ("int4+int8-w4a8kv4", "pca", None),
        ),
        (about({}, 16, 8, 16), ("int4-w16a8", None, None)),
        (about({"<b>": 1}, 4, 4, 16, transform="[red]x[/]", solver="\u001b[2J"), NOTHING),
        (
            about({"int4": "14"}, 4, 4, 16, transform=["quarot"], solver=None),
            ("int4-w4a4", None, None),
        ),
        (about({"x" * 99: 1}, 4, 4, 16, transform="y" * 99), NOTHING),
        (about({"int4": 14}, 4, "4", 16), NOTHING),
        (about({"int4": 14}, True, 4, 16), NOTHING),
        (about({"int4": 14}, 4, 10**400, 16), NOTHING),
        (about({"int4": 14}, 4), NOTHING),
        (about([], 4, 4, 4), ("int4-w4a4kv4", None, None)),
        ('{"bits": 4, "method": 7}', NOTHING),
        ("[]", NOTHING),
        ("{", NOTHING),
        ("[" * 100_000, NOTHING),
        ("\udcff", NOTHING),
        (None, NOTHING),
    ],
    ids=range(17),
)
def test_what_a_checkpoint_says_of_itself_is_read_as_data(tmp_path, text, expected):
    if text is not None:
        (tmp_path / ABOUT).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert tuple(held(tmp_path).values()) == expected


def test_a_lost_checkpoint_is_written_again_without_solving(tmp_path):
    first = run(tmp_path, "export=harness")
    assert run(tmp_path, "export=harness").stored
    shutil.rmtree(first.metrics["export"]["path"])
    again = run(tmp_path, "export=harness")
    assert not again.stored
    assert Path(again.metrics["export"]["path"]).is_dir()
    events = [
        json.loads(line)["event"]
        for line in (again.run.path / "events.jsonl").read_text().splitlines()
    ]
    assert events.count("block") == 2
    model, _ = harness.load(first.metrics["export"]["path"])
    assert_finite(model)


def test_what_a_killed_replacement_left_is_mended(tmp_path):
    first = Path(run(tmp_path, "export=harness").metrics["export"]["path"])
    first.rename(first.with_name(f".{first.name}.old"))
    again = run(tmp_path, "export=harness")
    assert again.metrics["export"]["path"] == str(first)
    assert left(tmp_path) == [first.name]


def test_another_run_never_replaces_a_checkpoint(tmp_path):
    for seed in (0, 1):
        assert run(tmp_path, "export=harness", "transform=quarot", f"seed={seed}").status == "done"
    names = left(tmp_path)
    assert len(names) == 2
    runs = [
        json.loads((tmp_path / "out" / name / "quantization_metadata.json").read_text())["seed"]
        for name in names
    ]
    assert sorted(runs) == [0, 1]


@pytest.fixture
def full_disk():
    """A switch: once on, no file can grow beyond 300 kB, which the run's own records do not
    need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", RIGHT)
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, layout, full_disk):
    assert (
        run(
            tmp_path,
            *(["format.act.compute_dtype=input"] if layout == "compressed_tensors" else []),
        ).status
        == "done"
    )
    full_disk(True)
    outcome = run(tmp_path, f"export={layout}")
    full_disk(False)
    assert outcome.status == "failed"
    assert re.search(
        f"export.path={tmp_path}/out: .*[Ff]ile too large.*nothing was left", outcome.error
    )
    assert left(tmp_path) == []
    assert run(tmp_path, f"export={layout}").status == "done"
    assert len(left(tmp_path)) == 1


def test_what_does_not_come_back_is_no_checkpoint(tmp_path, monkeypatch):
    """A layout that loses the last bit of a scale is caught by the gate, and an older checkpoint of
    that name stays."""
    from harness.checkpoints.compressed_tensors import CompressedTensors

    good = run(tmp_path, "export=compressed_tensors")
    weights = Path(good.metrics["export"]["path"]) / "model.safetensors"
    before = weights.read_bytes()
    plain = CompressedTensors.tensors

    def wrong(self, snapshot):
        for name, tensor in plain(self, snapshot):
            if name.endswith("layers.1.mlp.up_proj.weight_packed"):
                tensor = tensor.clone()
                tensor[0, 0] ^= 1
            yield name, tensor

    monkeypatch.setattr(CompressedTensors, "tensors", wrong)
    outcome = run(tmp_path, "export=compressed_tensors", "force=true")
    assert outcome.status == "failed"
    assert "model.layers.1.mlp.up_proj does not come back" in outcome.error
    assert len(left(tmp_path)) == 1
    assert weights.read_bytes() == before


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


def test_generation_with_a_quantized_cache_is_the_uncached_one(tmp_path):
    outcome = run(tmp_path, "export=harness", *RIGHT["harness"], "model.dtype=float32")
    model, tokenizer = harness.load(outcome.metrics["export"]["path"])
    model = model.double()
    ids = tokenizer("The limits of the language", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        told = model.generate(ids, max_new_tokens=20, do_sample=False)
        slow = ids
        for _ in range(20):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(told, slow)
    assert Adapter(model).blocks[0].self_attn.heads_input.format.bits == 4
    assert WINDOWS == 2
