"""Settings, texts and weights that no run can use are refused by name, or the run fails."""

import pytest
from composed import run, small

from harness.config.errors import ConfigError, DataError
from harness.models.tiny import Tiny
from harness.pipeline.job import execute


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["format.weight.group_size=7"], ["format.weight.group_size"]),
        (["format=int4", "format.weight.group_size=100"], ["format.weight.group_size=100", "192"]),
        (["format.weight.bits=abc"], ["format.weight.bits", "abc"]),
        (["format.weight.symmetric=false"], ["symmetric"]),
        (["solver=none"], ["format.weight.bits", "solver"]),
        (["format=none"], ["format.weight.bits", "solver"]),
        (["solver.scales=dynamic", "solver.order=activation"], ["solver.scales", "solver.order"]),
        (["transform=hadamard", "transform.block_size=128"], ["transform.block_size=128", "64"]),
        (["seed=abc"], ["seed"]),
        (["device=gpu"], ["device=gpu"]),
        (["on_error=ignore"], ["on_error"]),
        (["data=text"], ["data.path"]),
        (["data=text", "data.path=/nowhere"], ["data.path=/nowhere"]),
        (["data.calibration.windows=0"], ["data.calibration.windows"]),
        (["eval.perplexity.length=100000"], ["eval.perplexity.length=100000"]),
        (["eval.perplexity.corpora=[pydok]"], ["pydok", "pydoc"]),
        (["model.dtype=float8"], ["model.dtype=float8"]),
        (["model.family=gpt2"], ["model.family=gpt2"]),
        (["model=hf", "model.path=/nowhere/at/all"], ["model.path"]),
        (["data.calibration.path=/nowhere.txt"], ["data.calibration.path"]),
        (["format.kv.bits=4", "format.kv.group_size=7"], ["format.kv.group_size"]),
        (["tracking.tags=a"], ["tracking.tags"]),
        (["device=cuda:99"], ["device=cuda:99"]),
        (["transform=hadamard", "transform.backend=fast"], ["transform.backend"]),
        (["transform=hadamard", "transform.block_size=6"], ["transform.block_size=6"]),
        (["data.calibration.windows=100000"], ["data.calibration.windows=100000"]),
        (["eval.perplexity.corpora=3"], ["eval.perplexity.corpora=3"]),
        (["eval.perplexity=3"], ["eval.perplexity=3"]),
        (["+format.foo=1"], ["format.foo"]),
        (["+export.foo=1"], ["export.foo"]),
        (["+foo=1"], ["foo"]),
        (["run_root=null"], ["run_root"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, overrides, names):
    cfg, choices = small(tmp_path, *overrides)
    with pytest.raises((ConfigError, DataError)) as caught:
        execute(cfg, choices)
    for name in names:
        assert name in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_two_texts_of_one_name_are_refused(tmp_path):
    folder = tmp_path / "pydoc"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text(f"{part} words " * 500)
    cfg, choices = small(tmp_path, "data=text", f"data.path={folder}")
    with pytest.raises(ConfigError, match="two different texts"):
        execute(cfg, choices)


def test_nan_in_a_weight_names_the_tensor(tmp_path):
    model, tokenizer = Tiny().load()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cfg, choices = small(tmp_path, "model=hf", f"model.path={tmp_path / 'model'}")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        execute(cfg, choices)


def test_infinite_perplexity_is_a_failure(tmp_path):
    settings = [
        "solver=rtn",
        "format=int4",
        "format.weight.symmetric=false",
        "format.weight.degenerate=one",
        "format.weight.incl0=never",
    ]
    model, tokenizer = Tiny().load()
    model.model.layers[1].mlp.up_proj.weight.data[3] = (
        0  # FP-Quant's rule: a constant group has zero point NaN
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for count in (2, 3):  # the second run finds the first one's blocks
        outcome = run(
            tmp_path,
            "model=hf",
            f"model.path={tmp_path / 'model'}",
            *settings,
            f"eval.perplexity.windows={count}",
        )
        assert outcome.status == "failed"
        assert "not finite" in outcome.error
