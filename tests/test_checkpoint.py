"""The project's own checkpoint: what is loaded back is the evaluated model, in every bit; a file
that changed is refused."""

import json
from dataclasses import replace

import pytest
import torch
from composed import small
from preserved import CACHE
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import harness
from harness.checkpoints import shards
from harness.checkpoints.base import Snapshot
from harness.checkpoints.compressed_tensors import CompressedTensors
from harness.checkpoints.folder import digests, write_checkpoint
from harness.checkpoints.native_writer import Checkpoint
from harness.checkpoints.packed_linear import PackedLinear
from harness.checkpoints.record import spec
from harness.checkpoints.source import CheckpointModel
from harness.config.errors import ConfigError, DataError
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.pipeline import measure
from harness.pipeline.job import execute
from harness.quantize.weights import Solved
from harness.store import write_json

WINDOW = ["format.kv.bits=2", "format.kv.group_size=16", "format.kv.window=32"]
WINDOW += ["format.kv.key_axis=channel", "format.kv.zp=float_offset", "format.kv.incl0=never"]
CASES = {
    "plain": ["format=nvfp4", "format.act.compute_dtype=input", "solver=gptq"],
    "pca": ["transform=pca", "format=int4", "solver=rtn", "model.tie=false"],
    "rotations": [
        "transform=quarot",
        "format=w4a4kv4",
        "format.weight.group_size=32",
        "model.family=qwen3",
    ],
    "hadamard": ["transform=hadamard", "transform.random_signs=true", "format=mxfp4", "solver=rtn"],
    "adacodec": [
        "transform=adacodec",
        "transform.placement=site",
        "transform.steps=1",
        "transform.batch=1",
        "format=nvfp4",
        "model.family=qwen3",
        "model.tie=false",
    ],
    "smooth": [
        "transform=smoothquant",
        "format=int4",
        "solver=rtn",
        "format.kv.bits=8",
        "model.family=qwen2",
    ],
    "squares": [
        "transform=quarot",
        "format=fp8_block",
        "solver=gptq",
        "format.kv={kind: nvfp4, bits: 4}",
    ],
    "static fp8": [
        "format=fp8_static",
        "format.kv={kind: fp8, bits: 8, scale: unit}",
        "format.overrides={down_proj: if4}",
    ],
    "static cache": ["format=fp8_kv_static", "transform=quarot", "model.family=qwen3"],
    "static nvfp4 cache": [
        "format=none",
        "solver=none",
        "format.kv={kind: nvfp4, bits: 4, scale: static}",
    ],
    "window": ["format=none", "solver=none", *WINDOW],
    "merged": ["format=fouroversix", "solver=awq", "solver.grid=2"],
    "mixed": [
        "transform=quarot",
        "transform.smooth={alpha: 0.5, when: before}",
        "format=int4",
        "format.overrides={lm_head: 8, embed_tokens: 8, down_proj: mxfp8, first_1: {q_proj: 16}}",
    ],
    "static": [
        "format=int8",
        "format.act.granularity=tensor",
        "format.act.range=static",
        "solver=rtn",
        "format.overrides={lm_head: {weight: 8, act: {}}}",
        "model.dtype=bfloat16",
    ],
}
SHARD = 150_000
IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))


def evaluated(folder, patch, *overrides) -> Snapshot:
    """The model of a run at its last evaluation."""
    seen, evaluate = {}, measure.evaluate

    def watch(job, stage, adapter):
        seen.update(job=job, adapter=adapter)
        evaluate(job, stage, adapter)

    with patch.context() as patched:
        patched.setattr(measure, "evaluate", watch)
        outcome = execute(*small(folder, *overrides))
    assert outcome.status == "done", outcome.error
    job, adapter = seen["job"], seen["adapter"]
    scheme, plan = job.parts.scheme, job.plan
    solved = Solved(adapter, scheme, job.run)
    return Snapshot(
        adapter,
        job.tokenizer,
        scheme,
        job.placements,
        solved,
        plan.settings,
        plan.choices,
        job.metrics,
    )


def written(snapshot: Snapshot, folder):
    write_checkpoint(Checkpoint(), snapshot, folder)
    write_json(folder / "digests.json", digests(folder))
    return folder


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """{case: (snapshot, its checkpoint)}, each made once."""
    made, patch = {}, pytest.MonkeyPatch()

    def get(case: str):
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            snapshot = evaluated(root, patch, *CASES[case])
            patch.setattr(shards, "SHARD", SHARD)
            made[case] = snapshot, written(snapshot, root / "checkpoint")
        return made[case]

    yield get
    patch.undo()


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.to(ids.device)


@pytest.mark.parametrize("case", CASES)
def test_the_evaluated_model_comes_back_in_every_bit(case, snapshots):
    snapshot, folder = snapshots(case)
    wanted = logits(snapshot.adapter.model)
    for packed in (False, True):
        model, tokenizer = harness.load(folder, snapshot.adapter.device, packed=packed)
        assert torch.equal(logits(model), wanted)
        assert model.dtype == snapshot.adapter.model.dtype
    assert tokenizer("a word").input_ids == snapshot.tokenizer("a word").input_ids
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (
        snapshot.adapter.model.lm_head.weight is snapshot.adapter.model.model.embed_tokens.weight
    )
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_same_model(case, snapshots):
    snapshot, folder = snapshots(case)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), logits(snapshot.adapter.model))
    own, _ = harness.load(folder)
    wanted = own.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("case", CASES)
def test_generation_with_the_cache_is_that_of_whole_forwards(case, snapshots):
    """In float64, where a cached forward rounds as the whole one does."""
    model, _ = harness.load(snapshots(case)[1], dtype=torch.float64)
    model.generation_config.eos_token_id = None
    ids = IDS[:1]
    found = model.generate(
        ids, max_new_tokens=20, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    for _ in range(20):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found.sequences, ids)
    if case == "rotations":
        heads = found[CACHE].layers[0].keys.flatten(0, 2)
        assert max(len(head.unique()) for head in heads) <= 16, (
            "the plain cache of generate holds four-bit keys"
        )


def test_packed_linears_are_small(snapshots):
    dense, packed = (
        harness.load(snapshots("rotations")[1], packed=packed)[0] for packed in (False, True)
    )

    def size(model):
        return sum(x.nbytes for layer in model.model.layers for x in layer.buffers())

    assert size(packed) < size(dense) / 6
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14


def test_codes_and_formats_stand_in_the_files_once(snapshots):
    snapshot, folder = snapshots("mixed")
    names = []
    for path in folder.glob("model-*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    record = json.loads((folder / "harness.json").read_text())
    weights = {name: group["format"] for group in record["weights"] for name in group["names"]}
    assert len(names) == len(set(names))
    assert weights == {
        name: json.loads(json.dumps(spec(q.format))) for name, q in snapshot.qtensors.items()
    }
    assert {
        "lm_head.codes",
        "model.embed_tokens.codes",
        "model.layers.0.self_attn.q_proj.weight",
    } <= set(names)
    assert not {f"{name}.weight" for name in weights} & set(names)
    assert digests(folder) == json.loads((folder / "digests.json").read_text())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def later(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))


DAMAGES = {
    "flipped": ("model-00002-of-*.safetensors", flip, "model-00002-of-.*hash"),
    "truncated": ("model-00001-of-*.safetensors", truncate, "model-00001-of-.*hash"),
    "no shard": (
        "model-00002-of-*.safetensors",
        lambda path: path.unlink(),
        "lacks model-00002-of",
    ),
    "no index": (
        "model.safetensors.index.json",
        lambda path: path.unlink(),
        "lacks model.safetensors.index.json",
    ),
    "no digests": ("digests.json", lambda path: path.unlink(), "lacks digests.json"),
    "half digests": ("digests.json", truncate, "digests.json is damaged"),
    "unlisted": (
        "digests.json",
        lambda path: path.write_text("{}"),
        "digests.json says nothing of config.json, harness.json",
    ),
    "matrices": ("placement.safetensors", flip, "placement.safetensors is damaged"),
    "config": ("config.json", flip, "config.json is damaged"),
    "later": ("harness.json", later, "layout version 2"),
    "foreign": ("harness.json", lambda path: path.unlink(), "no checkpoint of this project"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_written_is_refused(damage, snapshots, tmp_path):
    _, whole = snapshots("rotations")
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pattern, change, message = DAMAGES[damage]
    change(next(iter(tmp_path.glob(pattern))))
    with pytest.raises(DataError, match=message) as refused:
        harness.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_as_the_model_of_a_run(snapshots, tmp_path):
    snapshot, folder = snapshots("rotations")
    source = CheckpointModel(path=str(folder))
    source.check()
    assert source.facts()["model_type"] == "qwen3"
    assert source.fingerprint() != CheckpointModel(path=str(snapshots("mixed")[1])).fingerprint()
    model, _ = source.load(snapshot.adapter.device)
    assert model.config.use_cache is False
    swap(Adapter(model))
    assert torch.equal(logits(model), logits(snapshot.adapter.model)), (
        "what is swapped already stays as it is"
    )
    cfg, choices = small(tmp_path, "format=none", "transform=identity", "solver=none")
    target = "harness.checkpoints.source.CheckpointModel"
    cfg.model = {
        "_target_": target,
        "name": None,
        "path": str(folder),
        "dtype": "auto",
        "amp": None,
    }
    outcome = execute(cfg, choices)
    assert (
        outcome.metrics["stages"]["baseline"]["ppl"]
        == snapshot.metrics["stages"]["quantized"]["ppl"]
    )


def test_a_checkpoint_of_a_checkpoint_is_the_same(snapshots, tmp_path):
    """Written again from the loaded model, with what the record says, nothing is lost on the
    way."""
    snapshot, folder = snapshots("static")
    model, _ = harness.load(folder)
    again = written(replace(snapshot, adapter=Adapter(model)), tmp_path / "again")
    assert digests(again) == digests(folder)


def test_a_compressed_tensors_folder_is_dequantized(snapshots, tmp_path):
    snapshot, _ = snapshots("plain")
    write_checkpoint(CompressedTensors(), snapshot, tmp_path / "exported")
    source = CheckpointModel(path=str(tmp_path / "exported"))
    source.check()
    model, _ = source.load()
    for name, quantized in snapshot.qtensors.items():
        assert torch.equal(
            model.get_submodule(name).weight, quantized.dequantize().bfloat16().cpu()
        )


def test_a_folder_of_another_kind_is_no_checkpoint(tmp_path):
    model, tokenizer = Tiny().load()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no checkpoint of this project"):
        harness.load(tmp_path)
    with pytest.raises(DataError, match="model=hf"):
        CheckpointModel(path=str(tmp_path)).check()
    with pytest.raises(ConfigError, match=r"model\.path"):
        CheckpointModel()
