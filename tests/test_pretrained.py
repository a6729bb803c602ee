"""A checkpoint of ours in transformers: refused by it alone; with `import harness` the evaluated
model in every bit, saved and uploaded as it was. (test_checkpoint.py holds every format to it.)"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import zoo
from composed import ROOT, small
from preserved import CACHE
from safetensors.torch import load_file
from test_checkpoint import CASES, IDS, evaluated, logits, written
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin

import harness
from harness.checkpoints import saved, shards
from harness.checkpoints.folder import digests
from harness.checkpoints.pretrained import HarnessConfig
from harness.config.errors import DataError
from harness.models.tiny import Tiny, byte_tokenizer
from harness.models.weights import weight_files
from harness.pipeline.job import execute
from harness.store import write_json


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


OTHERS = ("notes.txt", "adapter_model.safetensors", "model.fp16.safetensors", "model-1.safetensors")


@pytest.fixture
def sharded(folder, tmp_path, monkeypatch) -> Path:
    """Another model than that of `folder`, in two files of weights."""
    other = tmp_path / "sharded"
    shutil.copytree(folder, other)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    half = sum(tensor.nbytes for tensor in tensors.values()) * 2 // 3
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SHARD", half)
        shards.write_shards(iter(tensors.items()), other)
    write_json(other / "digests.json", digests(other))
    assert len(list(other.glob("model-*"))) == 2
    return other


def test_a_folder_in_use_gets_the_new_weights_and_keeps_what_is_of_others(
    folder, sharded, tmp_path
):
    used = tmp_path / "used"
    shutil.copytree(folder, used)
    for name in OTHERS:
        (used / name).write_text("mine")
    for source in (sharded, folder, sharded):  # from one file to two, and back
        model, _ = harness.load(source)
        model.save_pretrained(used)
        assert torch.equal(logits(harness.load(used)[0]), logits(model))
        assert {path.name for path in shards.laid(used)} == {
            path.name for path in shards.laid(source)
        }
        assert {(used / name).read_text() for name in OTHERS} == {"mine"}
        assert json.loads((used / "digests.json").read_text()) == digests(source)


def test_a_kill_in_between_leaves_nothing_that_loads(folder, sharded, tmp_path, monkeypatch):
    model, _ = harness.load(sharded)
    count = len(digests(sharded))
    for end in range(count):
        used = tmp_path / str(end)
        shutil.copytree(folder, used)
        copies = iter(range(end))

        def copied(source, target, copies=copies, copy=shutil.copyfile):
            if next(copies, None) is None:
                raise KeyboardInterrupt
            return copy(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(saved.shutil, "copyfile", copied)
            model.save_pretrained(used)
        with pytest.raises(DataError, match=r"digests\.json"):
            harness.load(used)
        with pytest.raises(DataError, match="holds neither"):
            weight_files(used)
        model.save_pretrained(used)
        assert torch.equal(logits(harness.load(used)[0]), logits(model))


def test_damage_since_it_was_loaded_is_not_hashed_anew(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    model, _ = harness.load(source)
    (source / "tokenizer.json").write_bytes(b"{}")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged or changed"):
        harness.load(tmp_path / "saved")


class Hub:
    """What of HfApi an upload calls."""

    calls: list

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repository, **options):
        self.calls.append(("create", repository, self.token, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repository}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("branch", repo_id, options))

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
    assert uploaded[1] == "me/small" and uploaded[3].pop("commit_message") == "first"
    assert uploaded[3] == {"allow_patterns": None, "delete_patterns": list(shards.LAYOUT)}
    files = uploaded[2]
    assert files.keys() == {path.name for path in folder.iterdir()}
    assert files["README.md"] == (folder / "README.md").read_bytes()
    calls.clear()
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert calls[1][1] == "me/named" and calls[1][2].keys() == files.keys()
    calls.clear()
    (tmp_path / "named" / "notes.txt").write_text("mine")
    asked = {"commit_message": "second", "commit_description": "why", "create_pr": True}
    model.save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="other", **asked)
    (_, name, _, options) = calls[1]
    assert name == "me/other" and asked.items() <= options.items()
    assert set(options["allow_patterns"]) == files.keys()
    calls.clear()
    model.save_pretrained(tmp_path / "named", push_to_hub=True, revision="next")
    assert calls[1] == ("branch", "me/named", {"branch": "next", "exist_ok": True})
    assert calls[2][3]["revision"] == "next"


def test_weights_of_another_layout_take_none_away(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setattr(Hub, "calls", calls, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    saved.upload(tmp_path, "small")
    assert calls[1][3] == {"allow_patterns": None, "delete_patterns": None}


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
