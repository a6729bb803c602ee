"""Mixed precision: which linear gets which format, what is refused, and that a run with it stores
and reports what it says."""

import json
from pathlib import Path

import pytest
import zoo
from composed import small
from safetensors import safe_open
from transformers import AutoConfig

import harness
from harness.checkpoints.encodings import QNN, TORCH
from harness.checkpoints.record import Record
from harness.config.build import build, option, settings
from harness.config.errors import ConfigError
from harness.formats import MX, Format
from harness.models.adapter import structure_of
from harness.models.tiny import Tiny, byte_tokenizer
from harness.pipeline.job import execute
from harness.pipeline.plan import make_plan
from harness.quantize.overrides import resolve

LAYERS = 6
STRUCTURE = structure_of(AutoConfig.for_model(**Tiny().facts() | {"num_hidden_layers": LAYERS}))
DOWN, UP, Q = "mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"


def resolved(overrides, format="int4"):
    return resolve(option("format", format) | {"overrides": overrides}, STRUCTURE)


def test_the_closer_name_wins():
    found = resolved(
        {
            "decoder": 4,
            "down_proj": 8,
            "first_2": 6,
            "blocks_1_1": {"down_proj": 3},
            "last_1": {"act": 8},
        }
    )
    bits = {
        (layer, name): parts["weight"].bits
        for (layer, name), parts in found.items()
        if "weight" in parts
    }
    assert bits[3, UP] == 4
    assert bits[3, DOWN] == 8
    assert bits[0, DOWN] == bits[1, UP] == 6
    assert bits[1, DOWN] == 3
    assert found[5, DOWN]["act"].bits == 8
    assert found[5, DOWN]["weight"].bits == 8, (
        "a part that is not named keeps what is named less closely"
    )


def test_values_may_be_bits_options_or_settings():
    found = resolved(
        {"down_proj": "mxfp8", "up_proj": {"weight": {"group_size": 32}}, "q_proj": {"weight": 16}}
    )
    assert isinstance(found[0, DOWN]["weight"], MX)
    assert found[0, DOWN]["act"].role == "activation"
    assert found[0, UP] == {
        "weight": build(
            option("format", "int4")["weight"] | {"group_size": 32}, "format.weight", Format
        )
    }
    assert found[0, Q] == {"weight": None}


def test_outside_the_blocks_only_what_is_named():
    assert resolved({}) == {}
    found = resolved({"lm_head": 8, "embed_tokens": 8})
    assert found[None, "lm_head"]["weight"].bits == 8
    assert found[None, "lm_head"]["act"] == build(
        option("format", "int4")["act"], "format.act", Format
    )
    assert set(found[None, "model.embed_tokens"]) == {"weight"}
    assert resolved({"lm_head": 16})[None, "lm_head"] == {"weight": None, "act": None}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"lm_hed": 8}, ["format.overrides.lm_hed", "lm_head"]),
        ({"down_proj": 99}, ["format.overrides.down_proj", "99"]),
        ({"down_proj": "int5"}, ["format.overrides.down_proj", "int5"]),
        ({"down_proj": {"weigth": 8}}, ["format.overrides.down_proj", "weigth"]),
        ({"first_9": 8}, ["format.overrides.first_9", "blocks 0 to 5"]),
        ({"blocks_4_9": 8}, ["format.overrides.blocks_4_9", "0 to 5"]),
        (
            {"first_3": 8, "blocks_2": 6},
            ["format.overrides.blocks_2", "format.overrides.first_3", "block 2"],
        ),
        ({"first_1": {"down": 8}}, ["format.overrides.first_1.down", "down_proj"]),
        ({"q_proj": {"act": 8}}, ["q_proj, k_proj, v_proj", "same act"]),
        ({"embed_tokens": {"act": 8}}, ["format.overrides.embed_tokens.act"]),
        ({"down_proj": None}, ["format.overrides.down_proj=None"]),
        (8, ["format.overrides=8"]),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(overrides, words):
    with pytest.raises(ConfigError) as refusal:
        resolved(overrides)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("overrides", "behind"),
    [
        ([], None),
        (["format.overrides={down_proj: int8}"], {"int8": "int8"}),
        (["format.overrides={first_1: {up_proj: {weight: mxfp8}}}"], {"mxfp8": "mxfp8"}),
    ],
    ids=str,
)
def test_what_stands_behind_an_option_is_part_of_the_run(tmp_path, overrides, behind):
    """An edited option is another run: its settings, not its name, are hashed."""
    cfg, choices = small(tmp_path, "format=int4", *overrides)
    named = make_plan(settings(cfg), choices)._format().get("named")
    expected = {name: option("format", own) for name, own in (behind or {}).items()}
    apart = [
        {name: {k: x for k, x in own.items() if k != "kv"} for name, own in options.items()}
        for options in (named or {}, expected)
    ]
    assert apart[0] == apart[1]


def test_float_formats_name_the_way_out():
    with pytest.raises(ConfigError, match=r"format\.overrides\.down_proj.*mxfp8"):
        resolved({"down_proj": 8}, "nvfp4")


@pytest.mark.parametrize("solver", ["rtn", "gptq", "minmax", "adascale", "awq", "signround"])
def test_a_mixed_run_stores_and_reports_what_it_says(tmp_path, solver):
    overrides = (
        "{embed_tokens: 8, lm_head: {weight: 8, act: int8}, down_proj: 8, first_1: {up_proj: 16}}"
    )
    short = {"adascale": "iterations=2", "awq": "grid=3", "signround": "steps=2"}
    quick = [f"solver.{short[solver]}"] if solver in short else []
    cfg, choices = small(
        tmp_path, "format=int4", f"solver={solver}", f"format.overrides={overrides}", *quick
    )
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    layers = {layer["name"]: layer for layer in outcome.metrics["layers"]}
    assert len(layers) == 2 * 7 + 2, "all linears, head and embedding"
    per_weight = {name: layer["bits"] / layer["weights"] for name, layer in layers.items()}
    assert per_weight["model.layers.0.mlp.up_proj"] == 32
    assert per_weight["model.layers.1.mlp.up_proj"] == 4 + 32 / 64
    assert per_weight["model.layers.0.mlp.down_proj"] == 8 + 32 / 64
    assert per_weight["lm_head"] == per_weight["model.embed_tokens"] == 8 + 32 / 64
    mean = sum(layer["bits"] for layer in layers.values()) / sum(
        layer["weights"] for layer in layers.values()
    )
    assert outcome.metrics["bits_per_weight"] == pytest.approx(mean)
    with safe_open(outcome.run.block(2), "pt") as file:
        assert {"lm_head.codes", "model.embed_tokens.codes", "head_in.range"} <= set(file.keys())
    (outcome.run.path / "status.json").unlink()  # again, from the stored blocks
    again = execute(cfg, choices)
    assert again.metrics["stages"] == outcome.metrics["stages"]
    folder = {"adascale": "encodings", "minmax": "min_max_encodings"}.get(solver)
    written = sorted(path.name for path in outcome.run.path.glob("*encodings/*"))
    assert written == ([] if folder is None else sorted([QNN, TORCH]))
    if folder is not None:
        told = json.loads((outcome.run.path / folder / QNN).read_text())["param_encodings"]
        bits = {entry["name"]: entry["bw"] for entry in told}
        assert bits["model.layers.0.mlp.down_proj.weight"] == 8
        assert bits["model.layers.1.mlp.up_proj.weight"] == 4
        assert "model.layers.0.mlp.up_proj.weight" not in bits


# experts

MIXTURE = "deepseek_v3"  # the first block dense; 4 experts and a shared one in the others
EXPERTS = {
    "down_proj": 8,  # of the dense block, the shared expert and the experts alike
    "experts.down_proj": 6,
    "experts.down_proj.3": 3,
    "blocks_2": {"shared_experts.down_proj": 5},
}
WANTED = {
    (0, "mlp.down_proj"): 8,
    (1, "mlp.shared_experts.down_proj"): 8,
    (2, "mlp.shared_experts.down_proj"): 5,
    **{(layer, f"mlp.experts.down_proj.{e}"): 6 for layer in (1, 2) for e in range(3)},
    **{(layer, "mlp.experts.down_proj.3"): 3 for layer in (1, 2)},
}


def test_experts_are_named_one_by_one_or_all_and_shared_ones_by_their_own():
    structure = structure_of(zoo.config(MIXTURE))
    found = resolve(option("format", "int4") | {"overrides": EXPERTS}, structure)
    assert {place: parts["weight"].bits for place, parts in found.items()} == WANTED


def test_a_number_alone_names_nothing():
    structure = structure_of(zoo.config(MIXTURE))
    with pytest.raises(ConfigError, match=r"overrides.3: names nothing.*down_proj"):
        resolve(option("format", "int4") | {"overrides": {"3": 8}}, structure)


def test_experts_that_share_a_rank_are_refused():
    structure = structure_of(zoo.config(MIXTURE))
    overrides = {"first_2": {"down_proj.3": 8}, "blocks_1": {"down_proj.3": 3}}
    with pytest.raises(ConfigError, match="let the ranges not meet"):
        resolve(option("format", "int4") | {"overrides": overrides}, structure)


def test_bits_of_experts_are_counted_and_their_codes_are_in_their_formats(tmp_path):
    model = zoo.make(MIXTURE)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    outcome = execute(
        *small(
            tmp_path,
            "model=hf",
            f"model.path={tmp_path / 'model'}",
            "format=int4",
            "format.act.bits=16",
            "format.weight.group_size=32",
            "solver=rtn",
            "format.overrides={experts.down_proj: 6, experts.down_proj.3: 2, "
            "shared_experts.down_proj: 3}",
            "export=harness",
            f"export.path={tmp_path / 'exports'}",
        )
    )
    assert outcome.status == "done", outcome.error
    layers = {layer["name"]: layer for layer in outcome.metrics["layers"]}
    weights = sum(layer["weights"] for layer in layers.values())
    bits = sum(layer["bits"] for layer in layers.values())
    assert outcome.metrics["bits_per_weight"] == pytest.approx(bits / weights)
    path = outcome.metrics["export"]["path"]
    formats = Record.read(Path(path)).weights
    loaded, _ = harness.load(path)
    for block in (1, 2):
        for linear, bits in {
            "experts.down_proj.0": 6,
            "experts.down_proj.3": 2,
            "experts.gate_up_proj.3": 4,
            "shared_experts.down_proj": 3,
            "shared_experts.up_proj": 4,
        }.items():
            name = f"model.layers.{block}.mlp.{linear}"
            layer = layers[name]
            assert formats[name].bits == bits
            # a group of 32 has a scale of 16 bits
            assert layer["bits"] / layer["weights"] == pytest.approx(bits + 0.5, abs=0.5)
            for group in loaded.get_submodule(name).weight.reshape(-1, 32)[:20]:
                assert len(group.unique()) <= 2**bits
