"""Models that see or hear too: the text decoder is found and quantized, all else stays as it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from composed import small
from composites import BLIND, COMPOSITES, compose
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

import harness
from harness.calibration.windows import tokenize, windows
from harness.config.errors import ConfigError, DataError
from harness.evaluation.gate import text_gate
from harness.evaluation.zeroshot import ZeroShot, zeroshot
from harness.libraries.transformers import attention_name
from harness.models.adapter import Adapter, structure_of
from harness.models.attention import attach
from harness.models.source import untie
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute
from harness.structure.__main__ import main
from harness.structure.derive import derive

NVFP4 = ["format=nvfp4", "solver=gptq"]
RTN = ["format=nvfp4", "solver=rtn"]
FEW = ["gemma3", "qwen2_vl", "llava"]
PROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the folder of a composite model with its tokenizer and processor, each made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            compose(name).save_pretrained(made[name])
            byte_tokenizer().save_pretrained(made[name])
            (made[name] / PROCESSOR).write_text('{"size": 28}')
        return made[name]

    return get


def run(tmp_path: Path, folder: Path, *settings: str):
    """What became of a run of the model in that folder."""
    model = ["model=hf", f"model.path={folder}", "data.bos=none"]
    if any(each.startswith("export=") for each in settings):
        model.append(f"export.path={tmp_path / 'exports'}")
    outcome = execute(*small(tmp_path, *model, *settings))
    assert outcome.status == "done", outcome.run.status.get("traceback")
    return outcome


def perplexity_of(outcome) -> float:
    return outcome.metrics["stages"]["quantized"]["ppl"]["pydoc"]


@torch.no_grad()
def own_perplexity(model: nn.Module, tmp_path: Path) -> float:
    """That of the model's own forward on the windows of `small`."""
    ids = tokenize(byte_tokenizer(), (tmp_path / "text" / "test.txt").read_text())
    losses = []
    for window in windows(ids, 128, 2):
        logits = model(input_ids=window[None], use_cache=False).logits[0].double()
        losses.append(nn.functional.cross_entropy(logits[:-1], window[1:]))
    return math.exp(torch.stack(losses).mean())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the weight files in a folder, by their names there."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def towers_there(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a folder that belong to what sees or hears, by their names there."""
    text = ("language_model.", "model.text_model.", "lm_head.", "model.layers.", "model.norm.")
    text += ("model.language_model.", "model.embed_tokens.")
    return {name: each for name, each in tensors(folder).items() if not name.startswith(text)}


# what is found


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_structure_from_the_config_is_that_of_the_loaded_model(name):
    model = compose(name)
    untie(model)
    structure = derive(model)
    assert structure == structure_of(model.config)
    beside = [name for name, _ in model.named_parameters() if structure.beside(name)]
    decoder = model.get_submodule(structure.blocks.rpartition(".")[0])
    inside = {id(each) for each in decoder.parameters()}
    inside.add(id(model.get_output_embeddings().weight))
    assert beside == [name for name, each in model.named_parameters() if id(each) not in inside]
    assert structure.residual.group is None
    assert all(tower in structure.residual.why[-1] for tower in structure.towers)


@torch.no_grad()
@pytest.mark.parametrize("name", COMPOSITES)
def test_a_text_alone_is_what_the_text_decoder_makes_of_it(name):
    model = compose(name)
    adapter = Adapter(model)
    ids = torch.randint(250, (2, 96), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    text_gate(adapter, ids, logits)
    with pytest.raises(RuntimeError, match=r"off those of its text decoder"):
        text_gate(adapter, ids, logits * 1.01)


@pytest.mark.parametrize("name", BLIND)
def test_what_runs_on_no_text_alone_is_refused(saved, tmp_path, name):
    reason = {"mllama": "a text alone does not pass block 1", "blip-2": "pixel_values"}[name]
    with pytest.raises(ConfigError, match=reason):
        run(tmp_path, saved(name), *RTN)


def test_the_table_is_the_text_decoders_and_names_the_towers(saved, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main([str(saved("llava"))]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("llava: 3 blocks in model.language_model.layers, residual stream of")
    towers = "model.vision_tower, model.multi_modal_projector"
    assert lines[1] == f"beside it, and left as it is: {towers}"
    assert f"R1 refused what {towers} give enters it as it is" in lines
    assert "R2 3 of 3 blocks" in lines
    assert "attn_in 128 self_attn.q_proj RMS norm, gain w: input_layernorm merges" in lines


def test_attention_of_towers_is_left_alone():
    model = compose("llava")
    config = model.config
    before = attention_name(config.vision_config)
    attach(Adapter(model))
    assert attention_name(config.text_config).startswith("harness_kv_")
    assert attention_name(config.vision_config) == attention_name(config) == before


# end to end


@pytest.mark.parametrize("name", [*FEW, "smolvlm", "qwen3_vl_moe"])
def test_nvfp4_by_gptq_end_to_end(saved, tmp_path, name):
    folder = saved(name)
    outcome = run(tmp_path, folder, *NVFP4, "export=harness")
    metrics = outcome.metrics
    structure = structure_of(compose(name).config)
    assert len(metrics["layers"]) == sum(
        len(site.linears) for layer in range(3) for site in structure.expanded(layer)
    )
    assert perplexity_of(outcome) != metrics["stages"]["baseline"]["ppl"]["pydoc"]

    exported = Path(metrics["export"]["path"])
    assert (exported / PROCESSOR).read_text() == (folder / PROCESSOR).read_text()
    model, _ = harness.load(exported)
    assert type(model) is type(compose(name))
    assert own_perplexity(model, tmp_path) == pytest.approx(perplexity_of(outcome), rel=1e-6)
    again = AutoModelForMultimodalLM.from_pretrained(exported).state_dict()
    assert all(torch.equal(again[each], tensor) for each, tensor in model.state_dict().items())
    # what is in no file is there, too
    original = compose(name)
    for tower in structure.towers:
        for (_, got), (_, wanted) in zip(
            model.get_submodule(tower).named_buffers(),
            original.get_submodule(tower).named_buffers(),
            strict=True,
        ):
            assert torch.equal(got, wanted)

    model_of = ["model=checkpoint", f"model.path={exported}", "format=none", "solver=none"]
    measured = execute(*small(tmp_path, *model_of, "data.bos=none")).metrics
    assert measured["stages"]["baseline"]["ppl"]["pydoc"] == pytest.approx(
        perplexity_of(outcome), rel=1e-9
    )


@pytest.mark.parametrize("name", [*FEW, "llava_onevision", "qwen2_audio", "mistral3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_are_written_as_they_were(tmp_path, name, dtype):
    """Whatever dtype the run computes in: byte by byte, under the names of the original."""
    folder = tmp_path / "model"
    compose(name).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    outcome = run(tmp_path, folder, *RTN, "export=harness", "model.dtype=float32")
    exported = tensors(Path(outcome.metrics["export"]["path"]))
    towers = towers_there(folder)
    assert len(towers) > 20
    for tensor_name, tensor in towers.items():
        assert exported[tensor_name].dtype == tensor.dtype == dtype
        assert torch.equal(exported[tensor_name], tensor)
    # once each
    model, _ = harness.load(outcome.metrics["export"]["path"])
    beside = Adapter(model).structure.beside
    own = {each for each, _ in model.named_parameters() if beside(each)}
    assert not own & set(exported) - set(towers)
    assert {each.dtype for each in model.parameters()} == {torch.float32}


@torch.no_grad()
def test_an_image_is_seen_as_before(saved, tmp_path):
    settings = ["export=harness", "format.kv.bits=4", "transform=quarot", "transform.r1=off"]
    outcome = run(tmp_path, saved("llava"), *RTN, *settings)
    assert outcome.metrics["notes"]["rotations"] == ["R2", "R3", "R4"]
    model, _ = harness.load(outcome.metrics["export"]["path"])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    seen, wanted = (
        each.get_image_features(pixels, vision_feature_layer=-1).pooler_output[0]
        for each in (model, compose("llava"))
    )
    assert torch.equal(seen, wanted)
    ids = torch.tensor([[3, *[250] * len(seen), 5, 7]])
    logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    blind = model(input_ids=ids, use_cache=False).logits
    assert logits.isfinite().all() and not torch.equal(logits, blind)


@pytest.mark.parametrize("name", [*FEW, "llama4", "qwen3_vl_moe"])
def test_blocks_on_disk_change_no_bit(saved, tmp_path, name):
    memory, disk = (
        run(tmp_path / where, saved(name), *RTN, "export=harness", f"model.weights={where}")
        for where in ("memory", "disk")
    )
    assert perplexity_of(memory) == perplexity_of(disk)
    first, second = (tensors(Path(each.metrics["export"]["path"])) for each in (memory, disk))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[each], second[each]) for each in first)


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_plain_transformers_loads_compressed_tensors(saved, tmp_path, name):
    outcome = run(tmp_path, saved(name), *RTN, "model.dtype=bfloat16", "export=compressed_tensors")
    exported = Path(outcome.metrics["export"]["path"])
    config = json.loads((exported / "config.json").read_text())
    original = compose(name).bfloat16()
    structure = structure_of(original.config)
    linears = [
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and structure.beside(name)
    ]
    assert linears and set(linears) <= set(config["quantization_config"]["ignore"])
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert "AutoModelForMultimodalLM.from_pretrained(" in (exported / "README.md").read_text()

    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    for name, parameter in original.named_parameters():
        if structure.beside(name):
            assert torch.equal(model.get_parameter(name), parameter)
    assert own_perplexity(model, tmp_path) == pytest.approx(perplexity_of(outcome), rel=0.005)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "qwen2_audio"])
def test_accuracy_is_that_of_a_text(tmp_path, name):
    rows = [{"context": "The cat sat on the", "continuation": "mat"}]
    rows += [{"context": "One, two,", "continuation": "three"}]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    model, tokenizer = compose(name), byte_tokenizer()
    settings = {"tasks": ["words"], "data_path": str(tmp_path), "batch_size": 2}
    _, samples = zeroshot(model, tokenizer, ZeroShot.of(settings))
    for row, sample in zip(rows, samples["words"], strict=True):
        before = tokenizer(row["context"])["input_ids"]
        ids = tokenizer(f"{row['context']} {row['continuation']}")["input_ids"]
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        own = sum(float(chances[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        assert sample["scores"] == pytest.approx([own], abs=1e-3)


# refusals


@pytest.mark.parametrize("name", FEW)
def test_the_stream_that_towers_write_is_not_rotated(saved, tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot be rotated, for .*give enters it as it is"):
        run(tmp_path, saved(name), *RTN, "transform=quarot")


def test_fp_quant_holds_no_towers(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"export=fp_quant with a llava: .*text decoders alone"):
        run(tmp_path, saved("llava"), *RTN, "export=fp_quant")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 0, "text_config: num_hidden_layers=0: needs a whole number"),
        ("num_key_value_heads", 3, "text_config: num_attention_heads=4 is no multiple"),
        ("max_position_embeddings", 96, "length=128 is more than the model's 96 positions"),
    ],
)
def test_what_the_decoders_config_says_is_heeded(saved, tmp_path, key, value, message):
    folder = shutil.copytree(saved("llava"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, DataError), match=message):
        run(tmp_path, folder, *RTN)


def test_a_tower_that_is_not_in_the_files(saved, tmp_path):
    folder = shutil.copytree(saved("llava"), tmp_path / "model")
    whole = tensors(folder)
    missing = next(name for name in whole if "multi_modal_projector" in name)
    save_file({k: v for k, v in whole.items() if k != missing}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks the weights model\.multi_modal_projector\."):
        run(tmp_path, folder, *RTN)
