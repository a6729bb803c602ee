"""A compressed-tensors file for vLLM: compressed-tensors' own transforms, put into what plain
transformers loaded, give what was evaluated; what vLLM would not run is refused."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import zoo
from composed import small
from compressed import NV, NV_ACT, logits, token, weight, written
from compressed_tensors.transform import TransformConfig, apply_transform_config
from preserved import tiny_shape
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from harness.checkpoints import online_config, online_reader
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.source import CheckpointModel
from harness.codecs.codec import Blocks
from harness.config.errors import ConfigError, DataError
from harness.formats import KVCache, Scheme
from harness.libraries.compressed_tensors import has_hadamard
from harness.models.adapter import shape_of, structure_of
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.transforms import Placement
from harness.transforms.gsr import SequencyBlocks
from harness.transforms.hadamard import HadamardBlocks
from harness.transforms.pca import PCA
from harness.transforms.quarot import QuaRot
from harness.transforms.residual import Residual
from harness.transforms.wush import Wush

REVISION = "0123456789abcdef0123456789abcdef01234567"
ALONE = Scheme(weight=weight())
CASES = {  # transform, formats, {(type, order): linears}
    "signs": (
        HadamardBlocks(16, random_signs=True),
        Scheme(weight=weight(symmetric=False)),
        {("random-hadamard", 16): 14},
    ),
    "whole sites": (
        HadamardBlocks("full"),
        ALONE,
        {("random-hadamard", 192): 12, ("random-hadamard", 384): 2},
    ),
    "R4": (QuaRot(r4="on"), ALONE, {("random-hadamard", 384): 2}),
    "activations": (
        HadamardBlocks(16),
        Scheme(weight=weight(8), act=token()),
        {("hadamard", 16): 14},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What was made of a case, once each."""
    made = {}

    def get(case: str):
        if case not in made:
            transform, scheme, _ = CASES[case]
            folder = tmp_path_factory.mktemp("online") / "checkpoint"
            made[case] = written(folder, *Tiny().load(), scheme, transform, engine="vllm")
        return made[case]

    return get


def config_of(made) -> TransformConfig:
    quantization = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    return TransformConfig(**quantization["transform_config"])


@pytest.mark.parametrize("case", CASES)
def test_the_library_s_transforms_give_what_was_evaluated(folders, case):
    made = folders(case)
    model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    logits(model)  # unpacks the weights
    apply_transform_config(model, config_of(made))
    entries = load_file(made.folder / "model.safetensors")
    matrices = {name: tensor for name, tensor in entries.items() if "online" in name}
    assert model.load_state_dict(matrices, strict=False).unexpected_keys == []
    torch.nn.Module.float(model)
    torch.testing.assert_close(logits(model), made.rounded, rtol=0, atol=1e-4)
    ours = CompressedTensors("vllm").load(made.folder, torch.device("cpu"), torch.float32)
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("case", CASES)
def test_the_config_says_which_matrix_stands_where(folders, case):
    made = folders(case)
    entries = load_file(made.folder / "model.safetensors")
    found = {}
    for name, scheme in config_of(made).config_groups.items():
        (applied,) = scheme.apply
        assert (applied.location, applied.inverse) == ("input", False)
        found[scheme.type, scheme.head_dim] = len(applied.targets)
        (matrix,) = (tensor for key, tensor in entries.items() if f".{name}_input." in key)
        assert set(matrix.unique().tolist()) == {-1.0, 1.0}
        assert len(matrix) == scheme.head_dim
    assert found == CASES[case][2]


def test_without_the_transform_it_is_another_model(folders):
    """Why plain transformers, which drops it, is no way to load such a file."""
    made = folders("activations")
    model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    assert (logits(model) - made.rounded).abs().max() > 0.1


def test_it_is_measured_again_with_its_transform(folders, tmp_path):
    made = folders("R4")
    model, _ = CheckpointModel(path=str(made.folder)).load()
    torch.nn.Module.float(model)
    torch.testing.assert_close(logits(model), made.rounded, rtol=0, atol=1e-4)
    for file in made.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    entries = load_file(made.folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in entries.items() if "online" not in name}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks .*down_proj\.online_0_input\.weight"):
        CheckpointModel(path=str(tmp_path)).load()


def cached(folder, cache, name: str):
    """The hub's cache with a folder in it as the one revision of a repository."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / REVISION)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(REVISION)


@torch.no_grad()
def test_lm_eval_runs_it_of_a_hub_id_as_of_a_folder(folders, tmp_path, monkeypatch):
    """Whether the repository is the folder, or holds it."""
    from harness.lm_eval.model import HarnessLM

    folder, where = folders("activations").folder, "huggingface_hub.constants"
    cached(folder, tmp_path, "some/model")
    shutil.copytree(folder, tmp_path / "whole" / "part")
    cached(tmp_path / "whole", tmp_path, "some/parts")
    monkeypatch.setattr(f"{where}.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(f"{where}.HF_HUB_OFFLINE", True)
    scores = [
        logits(HarnessLM(name, device="cpu", dtype="float32", **options).model)
        for name, options in (
            (str(folder), {}),
            ("some/model", {}),
            ("some/model", {"revision": REVISION}),
            ("some/parts", {"subfolder": "part"}),
            (str(tmp_path / "whole"), {"subfolder": "part"}),
        )
    ]
    assert all(torch.equal(each, scores[0]) for each in scores)
    assert (scores[0] - folders("activations").rounded).abs().max() < 1, "not run at all"
    with pytest.raises(OSError, match="find them in the cached files"):
        HarnessLM("some/other", device="cpu")


def test_a_run_holds_its_file_to_the_evaluation_with_the_transform(tmp_path, monkeypatch):
    words = ["format=w4a16", "format.weight.group_size=32", "solver=rtn", "transform=hadamard"]
    words += ["export=compressed_tensors", f"export.path={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"^transform=hadamard with .* set export\.engine=vllm"):
        execute(*small(tmp_path, *words))
    words.append("export.engine=vllm")
    with monkeypatch.context() as without:
        without.setattr(online_reader, "run", lambda *_: None)
        outcome = execute(*small(tmp_path, *words))
    assert outcome.status == "failed"
    assert "perplexity on pydoc" in outcome.error
    outcome = execute(*small(tmp_path, *words))
    assert outcome.status == "done", outcome.error
    for evaluated, loaded in outcome.metrics["export"]["ppl"].values():
        assert loaded == pytest.approx(evaluated, rel=1e-5)
    assert any("tensor_parallel_size=1" in each for each in outcome.metrics["warnings"])
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    card = (folder / "README.md").read_text()
    assert "vllm serve" in card
    assert "from transformers" not in card


FIELD = {
    "transform=": (SequencyBlocks(16), Wush(), PCA(), Residual()),
    "transform.online_heads=true": (QuaRot(r3="off", r4="off", online_heads=True),),
    "transform.r3=on": (QuaRot(r3="on", r4="off"),),
}


@pytest.mark.parametrize(
    ("field", "transform"),
    [(field, each) for field, all in FIELD.items() for each in all],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_what_vllm_does_not_run_is_refused(field, transform):
    scheme = Scheme(weight=weight(), act=token(), kv=KVCache())
    match = f"^{re.escape(field)}.* with .*export.engine=vllm: .* or use export=harness"
    with pytest.raises(ConfigError, match=match):
        CompressedTensors("vllm").check(scheme, [transform], tiny_shape(scheme))


def test_linears_that_vllm_leaves_alone_are_refused():
    mixture = shape_of(structure_of(zoo.make("mixtral").config), ALONE)
    biased = shape_of(structure_of(Tiny(family="qwen2").load()[0].config), ALONE)
    plain = tiny_shape(ALONE)
    wide = replace(plain, widths=dict.fromkeys(plain.widths, 284), structure=None)
    fused = tiny_shape(Scheme(weight=NV, act=NV_ACT))
    assert not has_hadamard(284)
    cases = {
        "model_type=mixtral.* routed experts": (HadamardBlocks(16), mixture),
        "q_proj has a bias": (HadamardBlocks(16), biased),
        "NVFP4 activations of attn_in by another rule": (HadamardBlocks(16), fused),
        "no Hadamard matrix of order 284": (HadamardBlocks(284), wide),
    }
    for why, (transform, shape) in cases.items():
        with pytest.raises(ConfigError, match=f"^transform=.*{why}.* export=harness"):
            CompressedTensors("vllm").check(shape.scheme, [transform], shape)
    assert CompressedTensors("vllm").check(ALONE, [QuaRot(r4="on")], biased)  # of down, none


def test_what_is_no_hadamard_matrix_is_not_written(folders):
    made = folders("activations")
    codec = Blocks(torch.eye(16))
    dense = Placement(online={(0, "down_in"): codec})
    turned = Placement(query_key=codec)
    cases = {
        "no Hadamard": [[dense], [turned]],
        r"two transforms .* attn_in": [[*made.snapshot.placements] * 2],
    }
    for why, placed in cases.items():
        for placements in placed:
            with pytest.raises(ConfigError, match=why):
                online_config.groups(replace(made.snapshot, placements=placements), "vllm")


def test_the_engine_is_one_that_is_known():
    with pytest.raises(ConfigError, match=r"^export\.engine=sglang"):
        CompressedTensors("sglang")
    assert CompressedTensors().library == "transformers"
