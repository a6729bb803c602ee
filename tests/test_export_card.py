"""What metadata and card say of a checkpoint whose figures are known by hand."""

import json

import pytest
import yaml
from composed import composed

from harness.checkpoints.base import Snapshot
from harness.checkpoints.card import card
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.metadata import metadata
from harness.checkpoints.native_writer import Checkpoint
from harness.config.build import build, settings
from harness.formats import NVFP4, Format, KVCache, Scheme
from harness.models import merge
from harness.models.adapter import Adapter
from harness.models.source import untie
from harness.models.tiny import Tiny

COMMAND = "python run.py format=w4a4kv4 'data.path=a|b'"


@pytest.fixture(scope="module")
def about(tmp_path_factory):
    """Metadata of a tiny model with two of its linears quantized, in a folder of 1,000 bytes of
    tensors and 24 of others."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_bytes(bytes(24))
    cfg, choices = composed("model=tiny", "format=w4a4kv4", "transform=quarot", "seed=3")
    model, tokenizer = Tiny().load()
    adapter = Adapter(model)
    merge.swap(adapter)
    untie(model)
    plain = settings(cfg)
    parts = {
        part: build(plain["format"][part], f"format.{part}", Format) for part in ("weight", "act")
    }
    chosen = {
        "model.layers.0.self_attn.q_proj": parts["weight"],
        "model.layers.1.mlp.down_proj": NVFP4(),
    }
    qtensors = {
        name: format.quantize(model.get_submodule(name).weight) for name, format in chosen.items()
    }
    metrics = {
        "run_id": "tiny-w4a4kv4-quarot-gptq-0123456789",
        "command": COMMAND,
        "stages": {
            "baseline": {
                "ppl": {"wiki|text": 22.75, "pydoc": 14.1234},
                "tokens": 64,
                "losses": {"pydoc": [3.1]},
                "zeroshot": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.035, "n": 200}},
            },
            "quantized": {
                "ppl": {"wiki|text": 25.5, "pydoc": float("inf")},
                "tokens": 64,
                "divergence": {"wiki|text": {"kl": 0.2125, "top1": 0.831}},
                "zeroshot": {"arc_easy": {"acc": 0.41, "acc_stderr": 0.0349, "n": 200}},
            },
        },
        "marks": {
            "wiki|text": ["same corpus as calibration", "first 8 of 145 windows"],
            "pydoc": [],
            "arc_easy": ["first 200 documents"],
        },
    }
    snapshot = Snapshot(
        adapter, tokenizer, Scheme(**parts, kv=KVCache()), (), qtensors, plain, choices, metrics
    )
    return metadata(snapshot, Checkpoint(), "tiny-QuaRot.GPTQ_w4_g64_a4_kv4_headfp16", folder)


def test_counts_and_sizes_by_hand(about):
    q, down = about["layers"]
    bits = 192 * 192 * 4 + 192 * 3 * 32  # three groups of 64 a row, scales in the model's float32
    assert q == {
        "name": "model.layers.0.self_attn.q_proj",
        "format": "int4",
        "bits": 4,
        "group_size": 64,
        "shape": [192, 192],
        "weights": 192 * 192,
        "stored_bits": bits,
    }
    assert (down["format"], down["stored_bits"]) == ("nvfp4", 192 * 384 * 4 + 192 * 24 * 8 + 32)
    assert about["quantized"] == "2/15"
    assert about["formats"] == {"int4": 1, "nvfp4": 1}
    block = 2 * 192 * 192 + 2 * 64 * 192 + 3 * 192 * 384 + 2 * 192
    before = 2 * (
        258 * 192 + 2 * block + 192
    )  # the head came tied to the embedding, and counts once
    assert about["sizes"] == {
        "before": before,
        "after": 1000,
        "files": 1024,
        "weights": (bits + down["stored_bits"]) // 8,
        "reduction_percent": 100 * (1 - 1000 / before),
    }
    packed = (
        2 * 2 * 2 * (32 * 4 + 32 + 4) / 8
    )  # layers, keys and values, heads; codes, float32 scale, zero point
    assert about["kv_cache"] == {
        "fp16": 512,
        "quantized": packed,
        "reduction_percent": 100 * (1 - packed / 512),
    }


def test_where_it_came_from(about):
    assert about["method"] == {"transform": "quarot", "solver": "gptq"}
    assert about["calibration"] == {
        "corpus": "pydoc",
        "windows": 32,
        "length": 512,
        "order": "first",
    }
    assert (about["seed"], about["command"], about["run_id"][-10:]) == (3, COMMAND, "0123456789")
    weights = {
        "format": "int4",
        "bits": 4,
        "group_size": 64,
        "granularity": "group",
        "symmetric": True,
    }
    assert about["bits"]["weights"] == weights
    assert about["bits"]["kv"]["granularity"] == "head" and about["bits"]["head"]["bits"] == 16
    assert set(about["evaluation"]["baseline"]) == {"ppl", "zeroshot", "tokens"}
    assert about["harness"].startswith("0.")


def cells(text: str, label: str) -> list[str]:
    """The cells of the one table row that begins with a label."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return row.split(" | ")[1:]


def test_the_card_shows_numbers_marks_and_command(about):
    text = card(json.loads(json.dumps(about)), Checkpoint())
    corpus = r"wiki\|text"
    assert cells(text, f"perplexity, {corpus}") == ["22.7500 cs", "25.5000 cs |"]
    assert cells(text, "perplexity, pydoc") == ["14.1234", "inf |"]
    assert cells(text, f"KL from the untouched model, {corpus}") == ["", "0.2125 cs |"]
    assert cells(text, r"accuracy in percent, arc\_easy") == [
        "acc 50.0 ± 3.5 s",
        "acc 41.0 ± 3.5 s |",
    ]
    assert cells(text, "weights")[0] == "int4 (1), nvfp4 (1)"
    assert f"- {corpus} (cs): same corpus as calibration, first 8 of 145 windows" in text
    assert f"```sh\n{COMMAND}\n```" in text
    assert "32 windows of 512 tokens" in text
    assert 'harness.load("tiny-QuaRot.GPTQ_w4_g64_a4_kv4_headfp16")' in text


def test_the_front_matter_is_yaml_whatever_the_names(about):
    front = card(about | {"base_model": "own: 'er\"/na#me"}, CompressedTensors()).split("---\n")[1]
    fields = yaml.safe_load(front)
    assert fields["base_model"] == "own: 'er\"/na#me"
    assert fields["library_name"] == "transformers"
    assert {"QuaRot", "GPTQ", "int4", "compressed-tensors"} <= set(fields["tags"])


def test_a_model_from_elsewhere_has_no_base_model(about):
    assert (about["base_model"], about["model"]) == (None, "tiny-llama")
    text = card(json.loads(json.dumps(about)), Checkpoint())
    fields = yaml.safe_load(text.split("---\n")[1])
    assert not {"base_model", "base_model_relation", "license"} & set(fields)
    assert "\ntiny-llama by QuaRot and GPTQ: " in text
    text = card(
        about | {"base_model": "owner/its-model", "revision": "v1", "license": "llama3.1"},
        Checkpoint(),
    )
    fields = yaml.safe_load(text.split("---\n")[1])
    assert (fields["base_model"], fields["base_model_relation"]) == ("owner/its-model", "quantized")
    assert fields["license"] == "llama3.1"
    assert "\nowner/its-model (revision v1) by " in text


def test_how_to_load_follows_the_layout(about):
    text = card(about | {"command": "echo '```'"}, CompressedTensors())
    assert "AutoModelForCausalLM.from_pretrained(" in text and "vllm serve tiny-QuaRot" in text
    assert "harness.load" not in text
    assert "````sh\necho '```'\n````" in text
