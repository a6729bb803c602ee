"""Zero-shot tasks between here and lm-eval: what it is told of one, and what stays of its answers.

A task is `agreement` (shipped, agreement.py), a file of documents (documents.py), or one of lm-eval
by name. lm-eval and datasets are imported where they are used, for not every run needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.config.checks import nearest
from harness.config.errors import ConfigError
from harness.evaluation.agreement import NAME, documents
from harness.evaluation.documents import read

METRICS = ("acc_norm", "acc", "exact_match", "mc2", "mc1")  # the first of a task is the one shown


def refuse_unknown(names: Iterable[str], include_path: str | None) -> None:
    """Raise ConfigError for a task that lm-eval does not know. Reading its list takes seconds."""
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=include_path, include_defaults=include_path is None).all_tasks
    for name in names:
        if name not in known:
            raise ConfigError(
                f"eval.zeroshot.tasks: there is no task {name}."
                f"{nearest(name, [*known, NAME])} Tasks are files of eval.zeroshot.data_path, "
                "agreement, and those of lm-eval."
            )


def configured(name: str, path: Path | None) -> dict | str:
    """A task as lm-eval takes it: a configuration with its documents, or a name.

    path: the file that holds it, if one does.
    """
    from datasets import Dataset, DatasetDict

    if path is None and name != NAME:
        return name
    rows = documents() if path is None else read(path)

    def load(**_) -> DatasetDict:
        return DatasetDict({"test": Dataset.from_list(rows)})

    return configuration(name, rows, path is None) | {"custom_dataset": load}


def configuration(name: str, rows: list[dict], shipped: bool) -> dict:
    """How lm-eval scores a task of these documents, all but where they are.

    shipped: they are those of agreement.
    """
    common = {"task": name, "test_split": "test", "metadata": {"version": 1}}
    if "context" in rows[0]:
        metrics = [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ]
        texts = {
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "target_delimiter": "",
        }
        return common | texts | {"output_type": "loglikelihood", "metric_list": metrics}
    if shipped:  # both answers are of one length, but not in bytes
        names = ["acc"]
        text = "{{query}}"
    else:
        names = ["acc", "acc_norm"]
        text = "{{query.rstrip() + '\\nAnswer:'}}"
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in names
    ]
    return common | {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": metrics,
    }


def show_examples(tasks: Mapping, count: int | None) -> None:
    """Have every task of lm-eval's show that many examples, as lm-eval's command does: none of its
    own without a number, and none at all where the task says so."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if count is not None and own != 0:
            task.set_config(key="num_fewshot", value=count)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def figures_of(result: Mapping, count: int | None) -> dict:
    """lm-eval's {"acc,none": .., "acc_stderr,none": ..} without filters' names (the last filter of
    a metric stands)."""
    figures = {
        key.partition(",")[0]: value for key, value in result.items() if isinstance(value, float)
    }
    return figures | {"n": count}


def sample(document: Mapping) -> dict:
    """What stays of one document: which one, its metrics, the log-likelihood of every answer."""
    scores = []
    for answer in document["filtered_resps"]:
        score = answer[0] if isinstance(answer, tuple | list) else answer
        if isinstance(score, int | float):  # a generated answer is a text
            scores.append(score)
    metrics = {key: document[key] for key in METRICS if isinstance(document.get(key), int | float)}
    return {"doc": document["doc_id"], **metrics, "scores": scores}
