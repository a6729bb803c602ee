"""Defaults of published systems by one word (conf/experiment/*_seed.yaml): each preset is its
system's table of arguments, value by value, and each row of the table is an override that composes
to what the row says."""

import re

import pytest
from composed import ROOT, composed, small
from format_parts import PARTS

from harness.config.build import build, settings
from harness.pipeline.job import execute
from harness.pipeline.sections import unnamed
from harness.pipeline.transforms import transforms_of
from harness.solvers import Solver

# Each system's own documents: (its argument, what our settings are with it).
JOINTQUANT = {
    "--model meta-llama/Llama-3.2-1B": {"model.path": "meta-llama/Llama-3.2-1B"},
    "--nsamples 128": {"data.calibration.windows": 128},
    "--seqlen 2048": {"data.calibration.length": 2048},
    "--seed 0": {"seed": 0},
    "--cal_dataset wikitext2": {"data.dataset": "Salesforce/wikitext"},
    "--r1_lr 1e-3": {"transform.r1.lr": 1e-3},
    "--r1_epochs 10": {"transform.r1.epochs": 10},
    "--r1_init hadamard": {"transform.random_signs": True},
    "--r2_lr 1e-3": {"transform.r2.lr": 1e-3},
    "--r2_epochs 5": {"transform.r2.epochs": 5},
    "--use_smooth": {"transform.smooth.when": "before"},
    "--smooth_alpha 0.5": {"transform.smooth.alpha": 0.5},
    "--w_bits 4": {"format.weight.bits": 4},
    "--a_bits 4": {"format.act.bits": 4},
    "--w_groupsize 128": {"format.weight.group_size": 128},
}
JOINTQUANT_OTHERS = {
    "--cal_dataset c4": {"data.dataset": "allenai/c4", "data.calibration.windows": 128},
    "--no_smooth": {"transform.smooth": None},
    "--eval_dataset wikitext2": {"eval.perplexity.corpora": ["wikitext2"]},
    "--output_dir DIR": {"run_root": "DIR"},
    "--save_rotations": {"transform.save": "rotations.safetensors"},
}
PCA = {
    "w_bits 4": {"format.weight.bits": 4, "format.overrides.lm_head": 4},
    "a_bits 4": {"format.act.bits": 4},
    "kv_bits 4": {"format.kv.bits": 4},
    "group_size 64": {"format.weight.group_size": 64},
    "rotation_method pca": {
        "transform._target_": "harness.transforms.pca.PCA",
        "transform.scope": "per_layer",
        "transform.head": True,
        "transform.center": True,
        "transform.post_hadamard": False,
    },
    "seed 13": {"seed": 13},
}
PCA_OTHERS = {
    "w_bits 8": {"format.weight.bits": 8, "format.overrides.lm_head": 8},
    "a_bits 8": {"format.act.bits": 8},
    "kv_bits 8": {"format.kv.bits": 8},
    "group_size 32": {"format.weight.group_size": 32},
    "group_size 128": {"format.weight.group_size": 128},
    "rotation_method hadamard": {"transform.block_size": "full"},
    "--calib FILE": {"data.calibration.path": "FILE", "data.calibration.windows": None},
    "--src MODEL": {"model.path": "MODEL"},
}
HUB = "data.dataset"
FP_QUANT = {
    "--dataset_name_or_path c4": {HUB: "allenai/c4"},
    "--sequence_length 2048": {"data.calibration.length": 2048},
    "--num_sequences 128": {"data.calibration.windows": 128},
    "--format nvfp": {
        "format.weight._target_": "harness.formats.NVFP4",
        "format.weight.group_size": 16,
    },
    "--w_bits 4": {"format.weight.bits": 4},
    "--w_observer minmax": {"format.weight.observer": "minmax"},
    "--a_bits 16": {"format.act.bits": 16},
    "--a_observer minmax": {"format.act.observer": "minmax"},
    "--fuse_global_scale": {"solver.fuse_global_scale": True},
    "--transform_class identity": {"transform._target_": "harness.transforms.identity.Identity"},
    "--dtype auto": {"model.dtype": "auto"},
    "--seed 42": {"seed": 42},
    "--eval_perplexity": {"eval.perplexity.corpora": ["wikitext2"], "eval.zeroshot": None},
}
GPTQ = "harness.solvers.gptq.GPTQ"
FP_QUANT_OTHERS = {
    "--model_name_or_path MODEL": {"model.path": "MODEL"},
    "--dataset_name_or_path fineweb-edu": {HUB: "HuggingFaceFW/fineweb-edu"},
    "--dataset_name_or_path open-platypus": {HUB: "garage-bAInd/Open-Platypus"},
    "--dataset_name_or_path ultrachat-200k": {HUB: "HuggingFaceH4/ultrachat_200k"},
    "--dataset_name_or_path tulu": {HUB: "allenai/tulu-3-sft-mixture"},
    "--dataset_name_or_path open-thoughts": {HUB: "open-thoughts/OpenThoughts-114k"},
    "--format int": {"format.weight._target_": "harness.formats.Integer", "format.act.bits": 16},
    "--format fp": {"format.weight._target_": "harness.formats.FP4"},
    "--format mxfp": {"format.weight.mx_scale": "fpquant", "format.weight.group_size": 32},
    "--scale_precision fp16": {"format.weight.scale_dtype": "fp16"},
    "--scale_precision e4m3": {"format.weight._target_": "harness.formats.NVFP4"},
    "--scale_precision e8m0": {"format.weight._target_": "harness.formats.MX"},
    "--w_granularity tensor": {"format.weight.granularity": "tensor"},
    "--w_granularity channel": {"format.weight.granularity": "channel"},
    "--w_granularity group": {"format.weight.granularity": "group"},
    "--w_group_size 32": {"format.weight.group_size": 32},
    "--w_observer mse": {"format.weight.observer": "mse"},
    "--a_bits 4": {"format.act.bits": 4, "format.act._target_": "harness.formats.NVFP4"},
    "--a_granularity tensor": {"format.act.granularity": "tensor"},
    "--a_granularity channel": {"format.act.granularity": "token"},
    "--a_granularity group": {"format.act.granularity": "group", "format.act.group_size": 32},
    "--a_group_size 32": {"format.act.group_size": 32},
    "--gptq": {"solver._target_": GPTQ, "solver.order": "default", "solver.damp": 0.01},
    "--quantization_order default": {"solver._target_": GPTQ, "solver.order": "default"},
    "--quantization_order activation": {"solver.order": "activation"},
    "--rel_damp 1e-2": {"solver.damp": 1e-2},
    "--transform_class hadamard": {"transform.name": "hadamard", "transform.random_signs": False},
    "--transform_class dct": {"transform.name": "dct"},
    "--transform_class dst": {"transform.name": "dst"},
    "--transform_class fast_food": {"transform.name": "fast_food"},
    "--transform_class gsr": {"transform.name": "gsr"},
    "--hadamard_group_size 128": {"transform.block_size": 128},
    "--export_quantized_model realquant": {"export.name": "fp_quant", "export.pseudo": False},
    "--export_quantized_model pseudoquant": {"export.name": "fp_quant", "export.pseudo": True},
    "--save_path DIR": {"export.path": "DIR"},
    "--amp": {"model.amp": "bfloat16"},
    "--cpu_offload_modules": {"model.weights": "disk"},
    "--cpu_offload_activations": {"data.calibration.activations": "disk"},
    "--eval_openllm": {
        "eval.zeroshot.tasks": [
            "mmlu_cot_llama",
            "arc_challenge_llama",
            "gsm8k_llama",
            "hellaswag",
            "winogrande",
            "truthfulqa",
        ],
        "eval.zeroshot.shots": {"hellaswag": 10, "winogrande": 5, "truthfulqa": 0},
        "eval.perplexity.windows": None,
    },
    "--lm_eval_batch_size 8": {"eval.zeroshot.batch_size": 8},
    "--lm_eval_tasks winogrande": {"eval.zeroshot.tasks": ["winogrande"]},
    "--log_wandb": {"tracking.name": None},
}
SEEDS = {
    "jointquant_seed": (JOINTQUANT, JOINTQUANT_OTHERS),
    "pca_seed": (PCA, PCA_OTHERS),
    "fp_quant_seed": (FP_QUANT, FP_QUANT_OTHERS),
}


def table(name: str) -> dict[str, list[str]]:
    """{argument: our overrides} as the preset's file documents them."""
    rows: dict[str, list[str]] = {}
    last: list[str] = []
    for line in (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines():
        row = re.fullmatch(r"#   (\S.*?)  +(\S.*=.*)", line)
        if row is not None:
            last = rows.setdefault(row[1], row[2].split())
        elif re.fullmatch(r"# {30,}\S+=.*", line):
            last += line[1:].split()
    return rows


def resolved(name: str, *overrides: str) -> dict:
    return settings(composed(f"experiment={name}", *overrides)[0])


def at(values, key: str):
    for word in key.split("."):
        values = values[word]
    return values


def builds(found: dict) -> None:
    """What works on weights can be made of the settings."""
    for part, base in PARTS.items():
        build(found["format"][part], f"format.{part}", base)
    build(unnamed(found["solver"]), "solver", Solver)
    transforms_of(found["transform"])


@pytest.mark.parametrize("name", SEEDS)
def test_a_preset_is_its_systems_table(name):
    usual, _ = SEEDS[name]
    found = resolved(name)
    builds(found)
    for argument, expected in usual.items():
        for key, value in expected.items():
            assert at(found, key) == value, argument


@pytest.mark.parametrize("name", SEEDS)
def test_each_row_is_an_override_that_says_the_same(name):
    """Those of the defaults change nothing, each other one changes what it says."""
    usual, others = SEEDS[name]
    rows = table(name)
    assert rows.keys() == usual.keys() | others.keys()
    assert resolved(name, *(each for row in usual for each in rows[row])) == resolved(name)
    for argument, expected in others.items():
        found = resolved(name, *rows[argument])
        builds(found)
        for key, value in expected.items():
            assert at(found, key) == value, argument


def test_what_jointquants_code_fixes():
    found = resolved("jointquant_seed")
    transform = found["transform"]
    assert transform["r1"] == {
        "lr": 1e-3,
        "epochs": 10,
        "batch": 512,
        "momentum": 0.9,
        "cosine": True,
        "grad_clip": 1.0,
        "steps_per_epoch": 1,
    }
    assert transform["r2"] == {
        "lr": 1e-3,
        "epochs": 5,
        "batch": 64,
        "momentum": 0.9,
        "cosine": True,
        "grad_clip": 1.0,
        "steps_per_epoch": None,
    }
    assert (transform["r3"], transform["r4"], transform["schedule"]) == ("off", "off", "joint")
    assert (transform["r1_targets"], transform["max_tokens_per_site"]) == (["up"], 128 * 256)
    assert transform["sinks"] == 0
    weight, act = found["format"]["weight"], found["format"]["act"]
    assert weight["symmetric"] and weight["int_range"] == "full"
    assert (act["symmetric"], act["granularity"], act["clip"]) == (False, "token", 1.0)
    assert (act["incl0"], act["zp_order"]) == ("never", "add_then_round")
    assert found["format"]["kv"]["bits"] == 16 and found["format"]["overrides"] is None
    assert found["solver"]["_target_"] == "harness.solvers.rtn.RTN"
    assert found["eval"]["perplexity"] == {"windows": None, "length": 2048, "corpora": ["data"]}


@pytest.mark.parametrize("name", SEEDS)
def test_a_preset_runs_without_the_hub_as_its_file_says(name):
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    (line,) = re.findall(r"^# Without the hub: (.*) beside it\.$", text, re.M)
    found = resolved(name, *line.split())
    builds(found)
    assert found["data"]["name"] == "pydoc"
    assert found["format"]["weight"]["group_size"] in (16, 64)
    assert set(found["eval"]["perplexity"]["corpora"]) <= {"data", "stdlib"}


@pytest.mark.parametrize("name", SEEDS)
def test_a_preset_runs_on_the_tiny_model(tmp_path, name):
    cfg, choices = small(tmp_path, f"experiment={name}", "format.weight.group_size=16")
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    assert choices["experiment"] == name
    ppl = outcome.metrics["stages"]["quantized"]["ppl"]
    assert ppl.keys() == {"pydoc"} and ppl["pydoc"] < 1000
