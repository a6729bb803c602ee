"""A checkpoint in vLLM itself, where that is installed: perplexities, generated tokens, scores of
lm-eval and the layers of each family are those of the evaluated model."""

import json
import os
import subprocess

import pytest
import torch
import zoo
from composed import ROOT, small
from engines import PYTHON, checkpoints, needs_vllm
from transformers import GenerationConfig

import harness
from harness.engines.vllm_losses import ENVIRONMENT
from harness.models.engine import FAMILIES
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute

ALIKE = {  # what a checkpoint holds: two layers, so that little is rounded to another code
    "weights": ["format=w4a16"],
    "nvfp4": ["format=nvfp4"],
    "mxfp4": ["format=mxfp4"],
    "int8": ["format=int8"],
    "cache": ["format=w4a16", "transform=quarot", "format.kv.bits=2"],
    "w4a4kv4": ["format=w4a4kv4", "transform=quarot"],
    "pca": ["format=nvfp4", "transform=pca"],
    "adacodec": [
        "format=nvfp4",
        "transform=adacodec",
        "transform.placement=site",
        "transform.steps=2",
    ],
    "head": ["format=int8", "format.overrides={lm_head: 8, embed_tokens: 8}"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: its checkpoint}, each made once."""
    return checkpoints(tmp_path_factory, {"cache": [*ALIKE["cache"], "solver=rtn"]})


def off(tmp_path, *overrides: str) -> float:
    """How far vLLM's perplexity is off, relatively."""
    run = [
        "eval=vllm",
        "solver=rtn",
        "eval.perplexity.length=96",
        f"export.path={tmp_path / 'out'}",
    ]
    outcome = execute(*small(tmp_path, *run, *overrides))
    assert outcome.status == "done", outcome.error
    stage = outcome.metrics["stages"]["quantized"]
    assert "vllm" in stage, outcome.metrics["warnings"]
    return abs(stage["vllm"]["pydoc"]["off"])


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("case", ALIKE)
def test_vllm_evaluates_what_was_evaluated(case, tmp_path):
    assert off(tmp_path, "export=harness", *ALIKE[case]) < 1e-4


GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64,
                skip_tokenizer_init=True)
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    said = model.generate(prompts, sampling, use_tqdm=False)
    print("SAID", json.dumps([list(each.outputs[0].token_ids) for each in said]))
"""


@needs_vllm
@pytest.mark.vllm
def test_vllm_says_what_we_say(folders):
    """Two prompts of different lengths, decoded together with rotated and quantized keys."""
    folder = folders("cache")
    model, _ = harness.load(folder)
    ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(2))
    prompts = [ids[0].tolist(), ids[1, :9].tolist()]
    wanted = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        asked = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
        asked.eos_token_id = None
        wanted.append(model.generate(given, generation_config=asked)[0, len(prompt) :].tolist())
    done = subprocess.run(
        [str(PYTHON), "-c", GENERATE, str(folder), json.dumps(prompts)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.partition("SAID ")[2].splitlines()[0]) == wanted


PROMPTS = ["def walk(self):", "The language reference", "import"]
GO_ON = """
task: go_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "the"
generation_kwargs: {{max_gen_toks: 8, until: ["\\0"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def scored(words: list[str]) -> None:
    """lm-eval's command in the environment that has vLLM."""
    done = subprocess.run(
        [str(PYTHON), "-m", "harness.lm_eval", *words],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@needs_vllm
@pytest.mark.vllm
def test_lm_eval_scores_and_generates_there(tmp_path):
    """NVFP4 W4A4, which has no kernel for a CPU: a choice between endings, and a text gone on
    with."""
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "ends.jsonl").write_text(
        "".join(
            json.dumps({"query": text, "choices": [" a b", " the", " 12"], "gold": 1}) + "\n"
            for text in PROMPTS
        )
    )
    run = ["format=nvfp4", "transform=quarot", "solver=rtn", "export=harness", "eval=zeroshot"]
    run += ["eval.zeroshot.tasks=[ends]", f"eval.zeroshot.data_path={documents}"]
    outcome = execute(*small(tmp_path, *run, f"export.path={tmp_path / 'out'}"))
    folder = outcome.metrics["export"]["path"]
    wanted = outcome.metrics["stages"]["quantized"]["zeroshot"]["ends"]["acc"]
    arguments = f"pretrained={folder},dtype=float32,enforce_eager=True,max_model_len=128"
    words = ["--model", "vllm", "--model_args", arguments, "--log_samples"]
    words += ["--output_path", str(tmp_path / "scores")]
    tasks = ["--tasks", "ends", "--data_path", str(documents)]
    scored(words + tasks)
    found = next((tmp_path / "scores").rglob("results_*.json"))
    assert json.loads(found.read_text())["results"]["ends"]["acc,none"] == wanted
    (tmp_path / "go_on.yaml").write_text(GO_ON.format(documents / "ends.jsonl"))
    scored([*words, "--tasks", "go_on", "--include_path", str(tmp_path)])
    path = next((tmp_path / "scores").rglob("samples_go_on_*.jsonl"))
    said = [json.loads(line)["resps"][0][0] for line in path.read_text().splitlines()]
    model, tokenizer = harness.load(folder)
    asked = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    for prompt, ours in zip(PROMPTS, said, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, generation_config=asked)[0, ids.shape[1] :]
        # bytes that are no text yet, vLLM holds back
        assert tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd") == ours


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_s_own_layers_are_those_of_transformers(family, tmp_path):
    """Weights alone, so that nothing but the engine's part differs; a head of 32 values, which its
    attention on a CPU takes."""
    folder = tmp_path / "model"
    sizes = {"head_dim": 32, "num_attention_heads": 4, "hidden_size": 128}
    zoo.make(family, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    run = ["model=hf", f"model.path={folder}", "format=w4a16", "format.weight.group_size=32"]
    run += ["data.bos=none", "transform=hadamard", "format.kv.bits=8", "export=harness"]
    assert off(tmp_path, *run) < 1e-3


@needs_vllm
@pytest.mark.vllm
def test_vllm_s_own_kernels_take_int8(tmp_path):
    assert off(tmp_path, "export=compressed_tensors", "format=int8", "model.dtype=bfloat16") < 1e-2
