"""A model in bfloat16 or float16 is evaluated as whoever loads its export serves it."""

import json
from pathlib import Path

import pytest
import torch
from exported import run
from safetensors import safe_open

from harness.libraries.compressed_tensors import cache_refusal
from harness.models.tiny import Tiny, byte_tokenizer

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
