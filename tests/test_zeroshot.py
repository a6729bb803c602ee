"""Zero-shot accuracy: what lm-eval itself gives for the same model and task, offline, and what is
refused."""

import json
from collections import Counter

import pytest
import torch
from composed import small
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from harness.config.errors import ConfigError, DataError
from harness.evaluation.agreement import NOUNS, documents
from harness.evaluation.zeroshot import ZeroShot, tasks_for_lm_eval, together, zeroshot
from harness.formats import NVFP4, Integer
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.report.figures import figures as figures_of

CHOICES = [
    {
        "query": f"Question: {n} plus one?\n",
        "choices": [str(n + 1), str(n + 2), "none"],
        "gold": n % 3,
    }
    for n in range(12)
]
WORDS = [
    {"context": "The cat sat on the", "continuation": "mat"},
    {"context": "One, two, three,", "continuation": "four"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tasks").mkdir()
    for name, rows in (("sums", CHOICES), ("words", WORDS)):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(row) for row in rows) + "\n"
        )
    return tmp_path / "tasks"


def loglikelihood(model, tokenizer, context, answer):
    ids, prefix = tokenizer(context + answer)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = range(prefix, len(ids))
    greedy = all(int(logits[i - 1].argmax()) == ids[i] for i in own)
    return sum(float(logits[i - 1, ids[i]]) for i in own), greedy


def test_accuracy_by_hand(folder):
    model, tokenizer = Tiny().load()
    chosen = ZeroShot.of({"tasks": ["sums", "words"], "data_path": str(folder), "batch_size": 4})
    figures, samples = zeroshot(model, tokenizer, chosen)
    right, normed = [], []
    for row, sample in zip(CHOICES, samples["sums"]):
        scores = [
            loglikelihood(model, tokenizer, row["query"].rstrip() + "\nAnswer:", " " + c)[0]
            for c in row["choices"]
        ]
        assert sample["scores"] == pytest.approx(scores, abs=1e-3)
        right.append(max(range(3), key=scores.__getitem__) == row["gold"])
        normed.append(
            max(range(3), key=lambda i, s=scores, row=row: s[i] / len(row["choices"][i]))
            == row["gold"]
        )
    assert figures["sums"]["acc"] == pytest.approx(sum(right) / 12)
    assert figures["sums"]["acc_norm"] == pytest.approx(sum(normed) / 12)
    p = figures["sums"]["acc"]
    assert figures["sums"]["acc_stderr"] == pytest.approx((p * (1 - p) / 11) ** 0.5)
    assert figures["sums"]["n"] == 12
    greedy = [
        loglikelihood(model, tokenizer, row["context"], " " + row["continuation"])[1]
        for row in WORDS
    ]
    assert figures["words"]["acc"] == sum(greedy) / 2
    shown = figures_of({"stages": {"quantized": {"zeroshot": figures}}})["quantized"]
    assert [one.record.metric for one in shown.values()] == ["acc_norm", "acc"]


def test_lines_end_at_newlines_and_a_row_is_what_its_own_keys_say(folder):
    """U+2028 and U+0085 are letters of a JSON string; what else a row holds, of whatever type, is
    not looked at."""
    more = [{"context": "A story.", "id": 1}, {"context": None, "id": "two"}, {}]
    rows = [{**row, "query": f"Read:\u2028{row['query']}\x85"} for row in CHOICES]
    for name, extra in (("plain", [{}] * 12), ("richer", more * 4)):
        lines = [json.dumps(row | own, ensure_ascii=False) for row, own in zip(rows, extra)]
        (folder / f"{name}.jsonl").write_bytes("\r\n".join(lines).encode())
    figures, samples = zeroshot(
        *Tiny().load(), ZeroShot.of({"tasks": ["plain", "richer"], "data_path": str(folder)})
    )
    assert figures["plain"]["n"] == 12
    assert figures["richer"] == figures["plain"]
    assert samples["richer"] == samples["plain"]


def test_the_same_as_lm_eval_itself(folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = Tiny(family="qwen3").load()
    chosen = ZeroShot.of({"tasks": ["agreement", "sums"], "data_path": str(folder), "limit": 10})
    figures, _ = zeroshot(model, tokenizer, chosen)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=tasks_for_lm_eval(chosen),
        limit=10,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=100,
    )["results"]
    for task in chosen.tasks:
        assert figures[task]["acc"] == found[task]["acc,none"]
        assert figures[task]["acc_stderr"] == found[task]["acc_stderr,none"]


def test_agreement_has_no_way_around():
    """Right and wrong answers, first and second places, verbs and nouns occur equally often; only
    agreement with the head helps."""
    docs = documents()
    assert Counter(doc["gold"] for doc in docs) == {0: 112, 1: 112}
    right, wrong = (
        Counter(doc["choices"][doc["gold"] ^ other] for doc in docs) for other in (0, 1)
    )
    assert right == wrong
    assert Counter(doc["query"].split()[1] for doc in docs) == Counter(
        doc["query"].split()[-1] for doc in docs
    )
    plural = {plural for _, plural in NOUNS}
    for doc in docs:
        head, verb = doc["query"].split()[1], doc["choices"][doc["gold"]].split()[0]
        assert (verb in ("are", "were")) == (head in plural)


def test_the_global_generators_are_left_alone(folder):
    import random

    torch.manual_seed(5)
    random.seed(5)
    before = torch.random.get_rng_state(), random.getstate()
    zeroshot(*Tiny().load(), ZeroShot.of({"tasks": ["agreement"], "limit": 4}))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_run_keeps_accuracies_and_samples(tmp_path, folder):
    tasks = [
        "eval.zeroshot.tasks=[agreement,sums]",
        f"eval.zeroshot.data_path={folder}",
        "eval.zeroshot.limit=8",
    ]
    settings = ["eval=zeroshot", *tasks]
    cfg, choices = small(tmp_path, *settings, "solver=rtn", "format=fp4")
    outcome = execute(cfg, choices)
    assert outcome.status == "done", outcome.error
    for stage in ("baseline", "quantized"):
        assert set(outcome.metrics["stages"][stage]["zeroshot"]) == {"agreement", "sums"}
    kept = json.loads((outcome.run.path / "samples" / "quantized" / "sums.json").read_text())
    mean = sum(sample["acc"] for sample in kept) / len(kept)
    assert mean == pytest.approx(outcome.metrics["stages"]["quantized"]["zeroshot"]["sums"]["acc"])
    assert list((tmp_path / "runs" / "_shared" / "baselines").glob("*/sums.json"))
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in CHOICES[::-1]))
    assert execute(cfg, choices).metrics["run_id"] != outcome.metrics["run_id"], (
        "another text is another run"
    )


SPANNING = {
    "all": ["format.act.scope=tensor"],
    "one_linear": ["format.overrides={blocks_1: {down_proj: {act: {scope: tensor}}}}"],
    "head": ["format.overrides={lm_head: {act: {scope: tensor}}}"],
}


@pytest.mark.parametrize("overrides", SPANNING.values(), ids=SPANNING)
def test_scales_that_span_tokens_give_the_same_scores_in_every_batch(tmp_path, folder, overrides):
    answers, ids = [], []
    for batch in (1, 8):
        tasks = [
            "eval.zeroshot.tasks=[sums]",
            f"eval.zeroshot.data_path={folder}",
            f"eval.zeroshot.batch_size={batch}",
        ]
        outcome = execute(
            *small(tmp_path / str(batch), "eval=zeroshot", *tasks, "solver=rtn", *overrides)
        )
        assert outcome.status == "done", outcome.error
        answers.append(
            json.loads((outcome.run.path / "samples" / "quantized" / "sums.json").read_text())
        )
        ids.append(outcome.metrics["run_id"])
    assert answers[0] == answers[1]
    assert ids[0] == ids[1]


def reading(act):
    """A tiny model whose last site reads its activation in a format."""
    model, _ = Tiny().load()
    adapter = Adapter(model)
    swap(adapter)
    adapter.blocks[-1].mlp.down_proj.site.format = act
    return model


@pytest.mark.parametrize(
    ("act", "batch"),
    [
        (None, 5),
        (NVFP4(role="activation", scope="token"), 5),
        (NVFP4(role="activation", scope="static"), 5),
        (NVFP4(role="activation"), 1),
        (Integer(role="activation", granularity="token"), 5),
        (Integer(role="activation", granularity="tensor"), 1),
    ],
    ids=str,
)
def test_only_a_scale_that_spans_tokens_parts_the_batch(act, batch):
    assert together(reading(act), 5) == batch


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        ({"strategy": "tensor", "dynamic": True}, 1),
        ({"strategy": "token", "dynamic": True}, 5),
        ({"strategy": "tensor", "dynamic": False}, 5),
        (
            {
                "strategy": "tensor_group",
                "group_size": 16,
                "dynamic": "local",
                "type": "float",
                "num_bits": 4,
            },
            5,
        ),
    ],
    ids=str,
)
def test_a_compressed_tensors_model_is_asked_too(settings, batch):
    """transformers runs those, by formats of that library."""
    model = reading(None)
    read = QuantizationArgs(**settings)
    model.lm_head.quantization_scheme = QuantizationScheme(
        targets=["Linear"], input_activations=read
    )
    assert together(model, 5) == batch


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        ({"tasks": []}, ConfigError, "eval.zeroshot.tasks"),
        ({"tasks": ["agreement"], "limt": 3}, ConfigError, "limit"),
        ({"tasks": ["agreement"], "limit": 0}, ConfigError, "limit=0"),
        ({"tasks": ["agreement"], "shots": {"agreement": -1}}, ConfigError, "agreement=-1"),
        ({"tasks": ["agreement"], "data_path": "/nowhere"}, DataError, "data_path=/nowhere"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(section, error, words):
    with pytest.raises(error, match=words):
        ZeroShot.of(section)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "line 1 is not JSON"),
        ('{"query": "a"}', "line 1 has neither"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 7}', "line 1 has neither"),
        ('{"context": "a", "continuation": 5}', "line 1 has neither"),
        ("", "empty"),
        (json.dumps(CHOICES[0]) + "\n" + json.dumps(WORDS[0]), "mixes"),
        ("\xe9", "not UTF-8"),
    ],
)
def test_bad_files_are_named(folder, content, words):
    (folder / "sums.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=words):
        ZeroShot.of({"tasks": ["sums"], "data_path": str(folder)})
