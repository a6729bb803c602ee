"""A checkpoint of ours in transformers: refused by it alone; with `import harness` the evaluated
model in every bit, saved and uploaded as it was. (test_checkpoint.py holds every format to it.)"""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import zoo
from composed import small
from preserved import CACHE
from test_checkpoint import CASES, IDS, evaluated, logits, written
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin

import harness
from harness.checkpoints.folder import digests
from harness.checkpoints.pretrained import HarnessConfig
from harness.config.errors import DataError
from harness.models.tiny import Tiny, byte_tokenizer
from harness.pipeline.job import execute
from harness.store import write_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, patch = tmp_path_factory.mktemp("pretrained"), pytest.MonkeyPatch()
    found = written(evaluated(root, patch, *CASES["rotations"]), root / "checkpoint")
    (found / "README.md").write_text("---\nlicense: apache-2.0\n---\n# What it is\n")
    return found


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


BOTH_ORDERS = """
import sys
import harness
assert not {"torch", "transformers"} & set(sys.modules)
finders = [type(each).__module__ for each in sys.meta_path if not isinstance(each, type)]
assert "harness.libraries.arrival" in finders
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "QuantLinear"
finders = [type(each).__module__ for each in sys.meta_path if not isinstance(each, type)]
assert "harness.libraries.arrival" not in finders
import transformers.quantizers
assert type(transformers.quantizers.__spec__.loader).__module__ == "_frozen_importlib_external"
"""
ALONE = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for kind in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "`import harness` before from_pretrained" in str(error), error
    else:
        raise AssertionError("loaded")
import harness
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "QuantLinear"
"""


@pytest.mark.parametrize("code", [BOTH_ORDERS, ALONE], ids=["first", "last"])
def test_transformers_alone_refuses_and_one_import_is_enough(code, folder):
    done = python(code, folder)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_generation_has_the_quantized_cache(folder):
    """Keys are stored in four bits, and every token is that of a forward over all before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.generation_config.eos_token_id = None
    ids = IDS[:1]
    found = model.generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    heads = found[CACHE].layers[0].keys.flatten(0, 2)
    assert max(len(head.unique()) for head in heads) <= 16
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found.sequences, ids)


def test_arguments_of_from_pretrained(folder):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert torch.equal(logits(model), logits(harness.load(folder, dtype=torch.bfloat16)[0]))
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.quantization_config.quant_method == "harness"
    assert not model.training
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(eager), logits(harness.load(folder)[0]), atol=1e-4, rtol=0)
    with pytest.raises(DataError, match="one device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    with pytest.raises(DataError, match="Qwen3ForCausalLM, and Qwen3Model was asked for"):
        AutoModel.from_pretrained(folder)


def test_a_float_model_is_not_quantized_by_it(tmp_path):
    Tiny().load()[0].save_pretrained(tmp_path)
    with pytest.raises(DataError, match="quantized already"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HarnessConfig())
    assert isinstance(HarnessConfig(), QuantizationConfigMixin)


@pytest.mark.parametrize("loaded", ["transformers", "harness", "packed"])
def test_it_is_saved_as_it_was(loaded, folder, tmp_path):
    if loaded == "transformers":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model, _ = harness.load(folder, packed=loaded == "packed")
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "again", max_shard_size="1MB")
    kept, again = digests(folder), digests(tmp_path / "again")
    different = {name for name in kept if kept[name] != again.get(name)}
    assert different == {"generation_config.json"} and kept.keys() == again.keys()
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert twice.generation_config.temperature == 0.25
    assert torch.equal(logits(twice), logits(model))
    twice.save_pretrained(tmp_path / "again")  # onto itself
    assert digests(tmp_path / "again") == again


def test_a_changed_model_is_not_saved_as_what_it_was(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 4] += 1e-3
    with pytest.raises(DataError, match=r"layers.1.mlp.down_proj.weight is not what"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


class Hub:
    """What of HfApi an upload calls."""

    calls: list

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repository, **options):
        self.calls.append(("create", repository, self.token, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repository}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, files, options))
        return f"https://huggingface.co/{repo_id}/tree/main"


def test_the_hub_gets_the_whole_folder_and_its_card(folder, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setattr(Hub, "calls", calls, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.push_to_hub("small", private=True, token="t", commit_message="first")
    created, uploaded = calls
    assert created == ("create", "small", "t", {"private": True, "exist_ok": True})
    assert uploaded[1] == "me/small" and uploaded[3] == {"commit_message": "first"}
    files = uploaded[2]
    assert files.keys() == {path.name for path in folder.iterdir()}
    assert files["README.md"] == (folder / "README.md").read_bytes()
    calls.clear()
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert calls[1][1] == "me/named" and calls[1][2].keys() == files.keys()


OFFLINE = """
import sys
import harness
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/small")
assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "QuantLinear"
"""


def test_a_checkpoint_on_the_hub_is_read_from_its_cache(folder, tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--me--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / revision).symlink_to(folder)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = python(OFFLINE, folder)
    assert done.returncode == 0, done.stderr


def test_a_folder_from_before_is_loaded_as_before(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for name in ("quantization_config", "transformers_weights", "architectures"):
        del config[name]
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "digests.json", digests(tmp_path))
    old, new = harness.load(tmp_path)[0], harness.load(folder)[0]
    assert torch.equal(logits(old), logits(new))
    assert not hasattr(new.config, "quantization_config")


@pytest.mark.parametrize("name", ["qwen3_moe", "granite", "gemma3_text", "gpt_oss"])
def test_other_structures_come_back_too(name, tmp_path):
    model = zoo.make(name)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    settings = ["model=hf", f"model.path={tmp_path / 'model'}", "format=int4", "solver=rtn"]
    settings += ["export=harness", f"export.path={tmp_path / 'out'}"]
    outcome = execute(*small(tmp_path, *settings))
    assert outcome.status == "done", outcome.error
    path = outcome.metrics["export"]["path"]
    wanted = logits(harness.load(path)[0])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), wanted)
