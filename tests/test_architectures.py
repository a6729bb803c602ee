"""Architectures of every kind end to end, from a folder through the pipeline: NVFP4 by GPTQ, and
exact rotations under INT4. What the pipeline measures of an untouched model is held to the model's
own forward, and every refusal names its reason."""

import math

import pytest
import torch
import zoo
from composed import small
from torch import nn
from torch.nn import functional as F

import harness
from harness.calibration.windows import tokenize, windows
from harness.config.errors import ConfigError, DataError
from harness.evaluation.gate import FLOAT_MAX, STREAM
from harness.evaluation.perplexity import perplexity, window_losses
from harness.models.adapter import Adapter, structure_of
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute

INT4 = ["format=int4", "format.weight.group_size=32", "solver=rtn"]
NVFP4 = ["format=nvfp4", "solver=gptq"]
FLOAT = ["format=none", "solver=none"]
OFF = {"r1": "off", "r2": "false", "r3": "off", "r4": "off"}
SAMPLE = [
    "gemma3_text", "phi3", "olmo2", "granite", "cohere", "gpt2", "gpt_neox", "falcon", "opt",
    "bloom", "mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "qwen3_next", "nemotron_h", "mamba",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (a model of the zoo, settings that run it from its folder), each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            model = zoo.make(name)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[name] = model, ["model=hf", f"model.path={folder}"]
        return made[name]

    return get


def quarot(**places: str) -> list[str]:
    """Settings of the rotations in these places alone."""
    return ["transform=quarot", *(f"transform.{k}={v}" for k, v in (OFF | places).items())]


@torch.no_grad()
def largest_logit(model: nn.Module) -> float:
    return float(model(zoo.token_ids(2, 128), use_cache=False).logits.abs().max())


# what is measured


@torch.no_grad()
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *SAMPLE,
        # logits are capped; hidden states are divided before the head; logits are multiplied
        "gemma2",
        "minicpm3",
        "falcon_h1",
    ],
)
def test_the_perplexity_is_that_of_the_models_own_forward(name, streaming):
    model = zoo.make(name)
    ids = zoo.token_ids(2, 96)
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    losses = window_losses(Adapter(model), ids, streaming=streaming)
    assert perplexity(losses, 96) == pytest.approx(float(loss.exp()), rel=1e-5)


# end to end


@pytest.mark.parametrize("name", SAMPLE)
def test_nvfp4_by_gptq_end_to_end(saved, tmp_path, name):
    model, settings = saved(name)
    outcome = execute(*small(tmp_path, *settings, *NVFP4))
    assert outcome.status == "done", outcome.error
    metrics = outcome.metrics
    assert metrics["notes"]["stream"] <= STREAM[torch.float32]
    assert metrics["notes"]["gate"]["max"] <= FLOAT_MAX * largest_logit(model)
    measured = {stage: figures["ppl"]["pydoc"] for stage, figures in metrics["stages"].items()}
    # 4 bits move a model, and leave one of random weights near where it was
    assert measured["quantized"] != measured["baseline"]
    assert measured["quantized"] == pytest.approx(measured["baseline"], rel=0.5)


@pytest.mark.parametrize("name", SAMPLE)
def test_all_that_a_block_multiplies_with_is_quantized_once(saved, tmp_path, name):
    """Every matrix that the structure has, each expert by itself, none twice."""
    model, settings = saved(name)
    outcome = execute(*small(tmp_path, *settings, "format=nvfp4", "solver=rtn"))
    names = [layer["name"] for layer in outcome.metrics["layers"]]
    adapter = Adapter(model)
    assert sorted(names) == sorted(
        adapter.name(layer, linear)
        for layer in range(adapter.structure.layers)
        for site in adapter.sites(layer)
        for linear in site.linears
    )
    weights = {layer["name"]: layer["weights"] for layer in outcome.metrics["layers"]}
    quantized = {
        matrix.parameter
        for sites in adapter.structure.sites
        for site in sites
        for matrix in site.matrices
        if matrix.quantize
    }
    assert sum(weights.values()) == sum(model.get_parameter(each).numel() for each in quantized)


@pytest.mark.parametrize("name", SAMPLE)
def test_rotations_are_exact_and_int4_follows(saved, tmp_path, name):
    """Every place that the architecture has, together."""
    model, settings = saved(name)
    structure = structure_of(model.config)
    places = {
        "r1": "random" if structure.residual.group is not None else "off",
        "r2": "true" if structure.merges("o_in") else "false",
        "r4": "on" if len(down_widths(structure)) == 1 else "off",
    }
    outcome = execute(*small(tmp_path, *settings, *INT4, *quarot(**places)))
    assert outcome.status == "done", outcome.error
    notes = outcome.metrics["notes"]
    wanted = [place.upper() for place, value in places.items() if value not in ("off", "false")]
    assert notes["rotations"] == wanted
    assert notes["stream"] <= STREAM[torch.float32]
    most = FLOAT_MAX * largest_logit(model)
    assert notes["gate"]["max"] <= most
    if wanted:  # no float32 model repeats its logits to the last bit when its weights are turned
        assert notes["gate"]["max"] > 0
    assert math.isfinite(outcome.metrics["stages"]["quantized"]["ppl"]["pydoc"])


def down_widths(structure) -> set[int]:
    return {
        site.width
        for sites in structure.sites
        for site in sites
        if site.name == "down_in" and site.linears
    }


# refusals

REFUSED = {
    "a norm behind the block": (
        "olmo2", quarot(r1="random"), "cannot be rotated, for a norm writes the residual stream",
    ),
    "a norm behind the block, learned": (
        "gemma3_text", ["transform=spinquant"], "a norm writes the residual stream",
    ),
    "a norm behind the embedding": (
        "bloom", quarot(r1="random"), "cannot be rotated, for a norm writes the residual stream",
    ),
    "positions of a formula": (
        "xglm", quarot(r1="random"), "a table that is no weight writes the residual stream",
    ),
    "experts alone": ("mixtral", quarot(r4="on"), "transform.r4=on: no site of this model"),
    "experts of their own": ("llama4_text", quarot(r1="random"), "transformers' experts interface"),
    "LayerNorm, and a rotation that moves the mean": (
        "gpt2", ["transform=spinquant", *INT4], "leave the vector of ones alone",
    ),
    "values behind a gate": ("qwen3_next", quarot(r2="true"), "transform.r2=true: no block's"),
    "attention of its own": ("falcon", quarot(r3="on"), "r3=on: .* not found by its name"),
    "a cache of its own": ("bloom", ["format.kv.bits=8"], "leave the cache in 16 bits"),
    "no attention": ("mamba", ["format.kv.bits=8"], "no block attends"),
    "a cache of attention that sees fewer tokens by its name": (
        "deepseek_v32", ["format.kv.bits=8"], "attention of another name sees other tokens",
    ),
    "rotated keys of attention that sees fewer blocks by its name": (
        "minimax_m3_vl_text", quarot(r3="on"), "attention of another name sees other tokens",
    ),
    "weights of a block that stands twice": (
        "zamba2", NVFP4, "blocks 1 and 3 share their weights",
    ),
    "a router that reads the block before": (
        "zaya", NVFP4, "block 1 reads more of block 0 than its hidden states",
    ),
    "an indexer of the block before": (
        "hy_v4", NVFP4, "block 2 reads more of block 1 than its hidden states",
    ),
    "four residual streams": (
        "gemma3n_text", ["format.kv.bits=8"], r"blocks take hidden states \[4, 1, T, 128\]",
    ),
    "heads of two sizes": ("gemma4_moe_text", quarot(r3="on"), "heads have 2 sizes"),
    "a forward that asks for content": (
        "jetmoe", NVFP4, "could not be looked through",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_names_its_reason_before_anything_is_computed(saved, tmp_path, what):
    name, chosen, reason = REFUSED[what]
    _, settings = saved(name)
    defaults = [] if any(each.startswith("format=") for each in chosen) else ["format=none"]
    defaults += [] if any(each.startswith("solver=") for each in chosen) else ["solver=none"]
    with pytest.raises(ConfigError, match=reason):
        execute(*small(tmp_path, *settings, *defaults, *chosen))
    assert not list(tmp_path.glob("runs/*/metrics.json"))


# what few architectures have: done, or refused with a reason before it begins

SMOOTH = [*FLOAT, "transform=smoothquant"]
CORNERS = {
    "r4 where down_in has two widths": ("deepseek_v3", [*INT4, "transform=quarot"]),
    "r3 where queries are wider than values": ("deepseek_v3", [*FLOAT, *quarot(r3="on")]),
    "r3 where keys are wider than values": ("mimo_v2_flash", [*FLOAT, *quarot(r3="on")]),
    "r1 of experts with biases": ("gpt_oss", [*FLOAT, *quarot(r1="random")]),
    "experts of what is no norm of the stream": ("minimax", NVFP4),
    "scales of attention in some blocks": ("qwen3_next", SMOOTH),
    "scales of experts in some blocks": ("deepseek_v3", SMOOTH),
    "scales of a norm that experts read first": ("granitemoeshared", SMOOTH),
    "scales of a norm that a state space reads too": ("falcon_h1", SMOOTH),
    "scales of what experts read that stay as they are": ("llama4_text", SMOOTH),
    "r2 where nothing attends": ("mamba", [*FLOAT, *quarot(r2="true")]),
    "two residual streams, a router by a table": ("deepseek_v4", NVFP4),
}


@pytest.mark.parametrize("what", CORNERS)
def test_what_cannot_be_done_is_refused_before_it_begins(saved, tmp_path, what):
    """Whatever is done is exact: a gate that stops a run is too late for one of hours."""
    name, chosen = CORNERS[what]
    _, settings = saved(name)
    try:
        outcome = execute(*small(tmp_path, *settings, *chosen))
    except (ConfigError, DataError):
        return
    assert outcome.status == "done", outcome.error
    assert outcome.metrics["notes"].get("stream", 0) < 1e-6


@pytest.mark.parametrize(
    "name",
    ["phi3", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_next", "mamba2", "gpt_neo"],
)
def test_what_is_exported_loads_back(saved, tmp_path, name):
    """Fused and turned matrices, experts with biases, an infinity in the config: each weight in
    every bit, and the logits."""
    _, settings = saved(name)
    export = ["export=harness", f"export.path={tmp_path / 'exports'}", "data.bos=none"]
    outcome = execute(*small(tmp_path, *settings, *NVFP4, *export))
    assert outcome.status == "done", outcome.error
    exported = outcome.metrics["export"]
    assert exported["weights"] == len(outcome.metrics["layers"])
    model, tokenizer = harness.load(exported["path"])
    text = (tmp_path / "text" / "test.txt").read_text()
    evaluated = windows(tokenize(tokenizer, text), 128, 2)  # as in composed.small
    losses = window_losses(Adapter(model), evaluated)
    assert perplexity(losses, 128) == pytest.approx(
        outcome.metrics["stages"]["quantized"]["ppl"]["pydoc"], rel=1e-6
    )
