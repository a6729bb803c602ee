"""The tasks of eval=zeroshot as task files of lm-eval, for its command."""

from __future__ import annotations

import json
from pathlib import Path

from harness.config.errors import DataError
from harness.evaluation.agreement import NAME, documents
from harness.evaluation.documents import read
from harness.evaluation.tasks import configuration


def write_tasks(data_path: str | None, folder: Path) -> list[str]:
    """Write {task}.yaml and its documents, of the shipped task and of each .jsonl file of
    data_path; returns the tasks. Raises DataError."""
    if data_path is not None and not Path(data_path).is_dir():
        raise DataError(f"--data_path {data_path}: is no folder.")
    files = sorted(Path(data_path).glob("*.jsonl")) if data_path is not None else []
    own = {path.stem: read(path) for path in files}
    tasks = {NAME: documents()} | own
    for name, rows in tasks.items():
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        task = configuration(name, rows, shipped=name not in own) | {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(lines)},
                "cache_dir": str(folder / "cache"),
            },
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return list(tasks)
