"""`python -m harness.structure`: what it says of configs without weights, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import zoo
from composed import ROOT

from harness.structure.__main__ import main
from harness.structure.derive import derive
from harness.structure.skeleton import skeleton
from harness.structure.table import kinds, ranges


@pytest.fixture(autouse=True)
def piped(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def told(tmp_path, capsys):
    """What is printed of a config of the zoo, each run of blanks as one."""

    def told(name: str) -> list[str]:
        zoo.config(name).save_pretrained(tmp_path)
        capsys.readouterr()
        assert main([str(tmp_path)]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return told


def test_a_llama_takes_everything(told):
    lines = told("llama")
    assert lines[0] == (
        "llama: 3 blocks in model.layers, residual stream of 128 features, embedding "
        "model.embed_tokens, head lm_head, final norm model.norm (RMS norm, gain w)"
    )
    assert "R1 any rotation" in lines
    assert "R2 3 of 3 blocks" in lines
    assert "KV cache 3 of 3 attention blocks" in lines
    assert "R4 3 of 3 blocks" in lines
    assert "smoothing down_in 3 of 3 blocks" in lines
    assert "blocks 0-2: attention of 4 heads, 2 KV heads, 32 features (self_attn)" in lines
    assert "attn_in 128 self_attn.q_proj RMS norm, gain w: input_layernorm merges" in lines
    assert "o_in 128 self_attn.o_proj self_attn.v_proj through heads merges" in lines
    assert "down_in 256 mlp.down_proj mlp.up_proj through product merges" in lines


def test_experts_are_counted_and_the_router_is_float(told):
    lines = told("mixtral")
    norm = "RMS norm, gain w: post_attention_layernorm"
    assert f"mlp_in 128 mlp.gate (float) {norm} merges" in lines
    assert f"experts_in (of mlp_in) 128 mlp.experts.gate_up_proj x 4 {norm} as mlp_in" in lines
    assert "smoothing experts_down_in 0 of 3 blocks 0-2: each expert reads it by itself" in lines
    assert "R4 0 of 3 blocks 0-2: no down_in" in lines


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "gemma2",
            "R1 refused a norm writes the residual stream, and no rotation passes its gain",
        ),
        ("gpt2", "R1 one that leaves the vector of ones alone a norm subtracts the mean"),
        ("gpt2", "smoothing down_in 0 of 3 blocks 0-2: neither factor is a matrix's output"),
        ("nemotron_h", "R2 1 of 4 blocks 0-1, 3: no attention"),
        ("gemma4_unified_text", "R3 refused heads have 2 sizes"),
        (
            "bloom",
            "KV cache refused: 0 of 3 attention blocks "
            "0-2: attention is not found by its name in transformers",
        ),
        ("mamba2", "R3 refused: 0 of 0 attention blocks no block attends"),
        (
            "minimax_m3_vl_text",
            "KV cache refused: 1 of 3 attention blocks "
            "1-2: attention of another name sees other tokens",
        ),
        ("zamba2", "quantization refused blocks 1 and 3 share their weights"),
    ],
)
def test_a_refusal_says_why(told, name, line):
    assert line in told(name)


def test_gemma_multiplies_by_one_more_than_the_weight(told):
    line = "attn_in 128 self_attn.q_proj RMS norm, gain 1 + w: input_layernorm merges"
    assert line in told("gemma2")


def test_each_kind_of_block_has_its_table(told):
    titles = [line.split(":")[0] for line in told("deepseek_v3") if line.startswith("block")]
    assert titles == ["block 0", "blocks 1-2"]


def test_blocks_with_other_kv_heads_are_of_another_kind():
    """Though the same matrices of the same input widths stand at their sites."""
    structure = derive(skeleton(zoo.config("llama")))
    other = replace(structure.attention[1], kv_heads=1)
    changed = replace(structure, attention={**structure.attention, 1: other})
    assert structure.kinds == changed.kinds == [[0, 1, 2]]
    assert [layers for layers, _, _ in kinds(changed)] == [[0, 2], [1]]


def test_layers_are_ranges():
    assert ranges([5, 0, 1, 2]) == "0-2, 5"
    assert ranges([7]) == "7"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "lacks config.json"),
        ("{", "is damaged, not JSON"),
        ("[]", "holds list, and needs an object"),
        ('{"model_type": 1}', "names no architecture"),
        ('{"model_type": "nosuch"}', "model_type=nosuch is unknown to transformers"),
        ('{"model_type": "clip"}', "no causal language model of this clip"),
        ('{"model_type": "llama", "num_attention_heads": 5}', "cannot be read as the config"),
    ],
)
def test_a_folder_that_tells_nothing_is_refused_in_a_sentence(tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    refused(capsys, says)


def test_a_forward_that_cannot_be_looked_through_is_refused(tmp_path, capsys):
    zoo.config("dbrx").save_pretrained(tmp_path)
    capsys.readouterr()
    assert main([str(tmp_path)]) == 2
    refused(capsys, "the forward of this dbrx cannot be looked through")


def test_a_hub_id_out_of_reach_is_refused(monkeypatch, capsys):
    def out_of_reach(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", out_of_reach)
    assert main(["owner/not-in-any-cache"]) == 2
    refused(capsys, "the hub cannot be reached")
    assert main(["/no/such/folder"]) == 2
    refused(capsys, "neither a folder here nor a hub id")


def test_a_hub_id_in_the_cache_needs_no_hub(tmp_path, monkeypatch, capsys):
    zoo.config("llama").save_pretrained(tmp_path)
    cached = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)
    assert main(["owner/llama"]) == 0
    assert capsys.readouterr().out.startswith("llama: 3 blocks")


def test_code_beside_a_config_is_not_run(tmp_path, capsys):
    zoo.config("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    path.write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit('run')", encoding="utf-8")
    assert main([str(tmp_path)]) == 0
    path.write_text(json.dumps(config | {"model_type": "own"}), encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    refused(capsys, "code of a model's own is not run")


def test_it_is_a_command(tmp_path):
    command = [sys.executable, "-m", "harness.structure", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def refused(capsys, says: str) -> None:
    """One line on standard error says it."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(".") and says in line
