"""A checkpoint of ours in vLLM: its linears, attention and head compute what was evaluated; what
they cannot is refused before a weight is loaded. Tests marked vllm start the engine itself."""

import importlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import zoo
from composed import small
from test_checkpoint import CASES, WINDOW, evaluated, written
from torch import nn
from transformers import GenerationConfig

import harness
from harness.config.errors import ConfigError, DataError
from harness.engines.served import Served, apart
from harness.engines.vllm_losses import ENVIRONMENT
from harness.evaluation.vllm import VLLM
from harness.formats import FP8, NVFP4, KVCache
from harness.models.engine import FAMILIES, refusal
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SERVED = ("adacodec", "mixed", "pca", "rotations", "static nvfp4 cache")
needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason="needs .venv-vllm: make vllm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: its checkpoint}, each made once."""
    made = {}

    def get(case: str) -> Path:
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            settings = (CASES | {"cache": [*ALIKE["cache"], "solver=rtn"]})[case]
            snapshot = evaluated(root, pytest.MonkeyPatch(), *settings)
            made[case] = written(snapshot, root / "checkpoint")
        return made[case]

    return get


def served(folder: Path) -> Served:
    return Served(folder, torch.device("cpu"), torch.float32)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# what an engine computes with


@pytest.mark.parametrize("case", SERVED)
def test_a_fused_linear_is_its_parts_in_every_bit(case, folders):
    model, _ = harness.load(folders(case))
    ours = served(folders(case))
    for block in ("model.layers.0", "model.layers.1"):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            owner, _, leaf = f"{block}.{name}".rpartition(".")
            parts = [model.get_submodule(f"{owner}.{part}") for part in PACKED.get(leaf, [leaf])]
            x = states(7, parts[0].in_features)
            # each by itself: a site's own text is read from memory of its own
            wanted = torch.cat([part(x.clone()) for part in parts], dim=-1)
            assert torch.equal(ours.fused(f"{block}.{name}", PACKED)(x), wanted), name
    x = states(5, model.config.hidden_size)
    assert torch.equal(ours.head(x), model.get_output_embeddings()(x))
    ids = torch.arange(9)
    looked_up = nn.functional.embedding(ids, ours.embedding)
    assert torch.equal(looked_up, model.get_input_embeddings()(ids))


def test_what_parts_share_is_encoded_and_quantized_once(folders, monkeypatch):
    fused = served(folders("adacodec")).fused("model.layers.0.self_attn.qkv_proj", PACKED)
    site = fused.parts[0].site
    assert [part.site for part in fused.parts] == [site] * 3
    seen, encode = [], type(site).encode
    monkeypatch.setattr(type(site), "encode", lambda self, x: (seen.append(x), encode(self, x))[1])
    for tokens in (3, 4):
        fused(states(tokens, fused.parts[0].in_features))
    assert [len(x) for x in seen] == [3, 4]


@pytest.mark.parametrize("case", ["rotations", "static nvfp4 cache"])
def test_attention_gets_what_ours_gets(case, folders):
    """Heads of tokens in a row, as engines lay them, against [B, heads, T, head_dim]."""
    model, _ = harness.load(folders(case))
    attention = model.get_submodule("model.layers.1.self_attn")
    size = attention.head_dim
    heads = served(folders(case)).heads("model.layers.1.self_attn.attn", size)
    assert heads is not None
    laid = [states(1, count, 11, size) for count in (6, 2, 2)]
    wanted = attention.heads_input(*laid)[:3]
    assert not torch.equal(wanted[1], laid[1])
    got = heads(*(x[0].transpose(0, 1).reshape(11, -1) for x in laid))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.view(11, -1, size).transpose(0, 1), other[0])


def test_attention_is_left_alone_where_nothing_acts_there(folders):
    assert served(folders("pca")).heads("model.layers.0.self_attn.attn", 32) is None


@pytest.mark.parametrize("case", ["mixed", "rotations"])
def test_an_engine_reads_norms_and_nothing_else(case, folders):
    from harness.models.weights import tensor_files

    others = served(folders(case)).others()
    left = {name for name in tensor_files(folders(case)) if not others.search(name)}
    model, _ = harness.load(folders(case))
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert left == norms
    assert all(not others.search(name.removeprefix("model.")) for name in norms)


# what is refused


@pytest.mark.parametrize(
    ("family", "kv", "why"),
    [
        ("deepseek_v3", None, "model_type=deepseek_v3"),
        ("gemma3", None, "only layers of gemma3_text, llama"),
        (None, None, "model_type=None"),
        ("llama", KVCache(bits=4, window=32, key_axis="channel", group_size=32), "window=32"),
    ],
)
def test_what_an_engine_computes_otherwise_is_refused(family, kv, why):
    assert why in (refusal(family, kv) or "")


def test_what_it_computes_alike_is_taken():
    assert {refusal(family, KVCache(bits=4)) for family in FAMILIES} == {None}
    token = FP8(granularity="token", role="activation")
    tensor = NVFP4(scope="tensor", role="activation")
    assert apart({"a": token}, alone=False) is None
    assert apart({"a": token, "b": tensor}, alone=True) is None
    assert "scales at b span tokens" in (apart({"a": token, "b": tensor}, alone=False) or "")


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["format=nvfp4"], "export=none: vLLM loads a checkpoint"),
        (["format=int4", *WINDOW, "export=harness"], "format.kv.window=32"),
        (["eval.evaluations.vllm.python=/nowhere/python"], "make vllm"),
        (["eval.evaluations.vllm.dtype=int8"], "eval.evaluations.vllm.dtype=int8"),
        (["eval.evaluations.vllm.windows=0"], "eval.evaluations.vllm.windows"),
    ],
)
def test_a_run_is_refused_before_weights(overrides, error, tmp_path):
    run = ["eval=vllm", f"eval.evaluations.vllm.python={sys.executable}", "solver=rtn", *overrides]
    with pytest.raises(ConfigError, match=re.escape(error)):
        execute(*small(tmp_path, *run))


# the plug-in, with a stand-in for what it derives from


class Layer(nn.Module):
    """Any layer of vLLM's."""

    head_size = 48


def stand_in(monkeypatch, settings) -> dict[str, type]:
    """Modules by vLLM's names, with the classes that the plug-in asks for; returns those."""
    base = "vllm.model_executor.layers"
    kinds = {
        name: type(name, (Layer,), {})
        for name in ("Attention", "LinearBase", "VocabParallelEmbedding")
    }
    kinds["ParallelLMHead"] = type("ParallelLMHead", (kinds["VocabParallelEmbedding"],), {})
    registered: dict[str, type] = {}

    def register(name):
        return lambda cls: registered.setdefault(name, cls)

    class Method:
        def __init__(self, *args):
            pass

    class Config:
        def __init__(self):
            self.packed_modules_mapping = dict(PACKED)

    class Mapper:
        def __init__(self, orig_to_new_regex):
            self.regex = orig_to_new_regex

    modules = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: settings},
        "vllm.model_executor": {},
        base: {},
        f"{base}.attention": {"Attention": kinds["Attention"]},
        f"{base}.linear": {"LinearBase": kinds["LinearBase"], "LinearMethodBase": Method},
        f"{base}.quantization": {"register_quantization_config": register},
        f"{base}.quantization.base_config": {"QuantizationConfig": Config},
        f"{base}.quantization.kv_cache": {"BaseKVCacheMethod": Method},
        f"{base}.vocab_parallel_embedding": kinds,
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"WeightsMapper": Mapper},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "harness.engines.vllm_plugin", raising=False)
    importlib.import_module("harness.engines.vllm_plugin").register()
    monkeypatch.delitem(sys.modules, "harness.engines.vllm_plugin")
    return kinds | registered


def engine(eager=True, world=1, sequences=1, cached=False, tokens=64):
    class Settings:
        class model_config:
            enforce_eager = eager
            dtype = torch.float32
            max_model_len = 64

        class cache_config:
            enable_prefix_caching = cached

        class parallel_config:
            world_size = world

        class scheduler_config:
            max_num_seqs = sequences
            max_num_batched_tokens = tokens

    return Settings


def test_the_plug_in_gives_each_layer_ours(folders, monkeypatch):
    folder = folders("rotations")
    kinds = stand_in(monkeypatch, engine())
    config = kinds["harness"].from_config({"quant_method": "harness"})
    config.maybe_update_config(str(folder))
    model, _ = harness.load(folder)
    x = states(4, model.config.hidden_size)

    linear = kinds["LinearBase"]()
    method = config.get_quant_method(linear, "model.layers.0.mlp.gate_up_proj")
    method.create_weights(linear, 1, [2], 3)
    assert not list(linear.parameters())
    gate, up = (model.get_submodule(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
    garbage = torch.full((2 * gate.out_features,), torch.nan)
    assert torch.equal(method.apply(linear, x, garbage), torch.cat([gate(x), up(x)], -1))

    head = kinds["ParallelLMHead"]()
    method = config.get_quant_method(head, "lm_head")
    assert method.tie_weights(head, nn.Embedding(2, 2)) is head
    assert torch.equal(method.apply(head, x), model.lm_head(x))

    table = kinds["VocabParallelEmbedding"]()
    ids = torch.tensor([3, 1])
    found = config.get_quant_method(table, "").embedding(table, ids)
    assert torch.equal(found, model.get_input_embeddings()(ids))

    class Told(kinds["Attention"]):
        def forward(self, *states):
            return states

    attention = Told()
    config.get_quant_method(attention, "model.layers.0.self_attn.attn").create_weights(attention)
    laid = [states(4, count * Layer.head_size) for count in (6, 2, 2)]
    heads = served(folder).heads("model.layers.0.self_attn.attn", Layer.head_size)
    assert heads is not None
    for one, other in zip(attention(*laid), heads(*laid), strict=True):
        assert torch.equal(one, other)

    pattern = next(iter(config.get_checkpoint_weight_mapper().regex))
    assert pattern.search("model.layers.0.mlp.up_proj.codes")
    assert not pattern.search("model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize("other", [{"sequences": 2}, {"cached": True}, {"tokens": 63}])
def test_the_plug_in_keeps_scales_that_span_tokens_to_one_forward(other, tmp_path, monkeypatch):
    run = ["format=nvfp4", "format.act.scope=tensor", "solver=rtn"]
    folder = written(evaluated(tmp_path, monkeypatch, *run), tmp_path / "checkpoint")
    for settings, refused in ((engine(), False), (engine(**other), True)):
        config = stand_in(monkeypatch, settings)["harness"].from_config({})
        config.maybe_update_config(str(folder))
        if refused:
            with pytest.raises(DataError, match="span tokens"):
                config.get_checkpoint_weight_mapper()
        else:
            config.get_checkpoint_weight_mapper()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (engine(eager=False), "enforce_eager=True"),
        (engine(world=2), "tensor_parallel_size=1"),
    ],
)
def test_the_plug_in_refuses_what_would_not_be_ours(settings, error, folders, monkeypatch):
    kinds = stand_in(monkeypatch, settings)
    config = kinds["harness"].from_config({})
    config.maybe_update_config(str(folders("rotations")))
    with pytest.raises(DataError, match=error):
        config.get_quant_method(kinds["LinearBase"](), "model.layers.0.mlp.gate_up_proj")
    config.maybe_update_config("owner/name")
    with pytest.raises(DataError, match="is no folder"):
        config.get_quant_method(kinds["LinearBase"](), "model.layers.0.mlp.gate_up_proj")


# the evaluation, with a script in the engine's place


def program(path: Path, code: str) -> str:
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


UNIFORM = """
import json, math, sys
asked = json.load(open(sys.argv[2]))
losses = {c: [(len(w) - 1) * math.log(7) for w in ws] for c, ws in asked["windows"].items()}
json.dump({"losses": losses}, open(sys.argv[3], "w"))
"""


def test_its_figures_stand_beside_the_run_s_own(tmp_path):
    python = program(tmp_path / "uniform", UNIFORM)
    run = ["eval=vllm", f"eval.evaluations.vllm.python={python}", "format=int4", "solver=rtn"]
    run += ["eval.evaluations.vllm.windows=1", "export=harness", f"export.path={tmp_path / 'out'}"]
    outcome = execute(*small(tmp_path, *run))
    assert outcome.status == "done", outcome.error
    stages = outcome.metrics["stages"]
    found = stages["quantized"]["vllm"]["pydoc"]
    here = (
        torch.tensor(stages["quantized"]["losses"]["pydoc"][:1], dtype=torch.float64).mean().exp()
    )
    assert found["ppl"] == pytest.approx(7)
    assert found["here"] == pytest.approx(float(here))
    assert found["off"] == pytest.approx(7 / float(here) - 1)
    assert "vllm" not in stages["baseline"]
    assert {"vllm"} <= {record["evaluation"] for record in outcome.metrics["records"]}


def test_what_the_engine_refuses_is_tried_again_from_the_stored_blocks(tmp_path):
    python = program(tmp_path / "refuses", "raise SystemExit('no kernel for it')")
    run = ["eval=vllm", f"eval.evaluations.vllm.python={python}", "format=nvfp4", "solver=rtn"]
    run += ["export=harness", f"export.path={tmp_path / 'out'}"]
    failed = execute(*small(tmp_path, *run))
    assert failed.status == "failed" and failed.run.status["status"] == "failed"
    assert "eval=vllm: vLLM refuses" in failed.error and "no kernel for it" in failed.error
    assert "the same command tries this again" in failed.error
    stages = failed.run.metrics["stages"]
    assert stages["quantized"]["ppl"] and "vllm" not in stages["quantized"]
    assert Path(failed.run.metrics["export"]["path"]).is_dir()
    assert failed.run.metrics["bits_per_weight"]
    program(tmp_path / "refuses", UNIFORM)
    again = execute(*small(tmp_path, *run))
    assert (again.status, again.stored) == ("done", False), again.error
    assert again.metrics["stages"]["quantized"]["vllm"]["pydoc"]["ppl"] == pytest.approx(7)
    events = (again.run.path / "events.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "block" for line in events) == 2, "each solved once"
    assert left(tmp_path / "out") == [Path(again.metrics["export"]["path"]).name]
    assert execute(*small(tmp_path, *run)).stored


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_where_vllm_is_moves_no_run():
    one, other = VLLM(python="a/python"), VLLM(python="b/python")
    assert one.fingerprint() == other.fingerprint() != VLLM(windows=3).fingerprint()


# the engine itself


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
