"""A text to calibrate on that is no part of a data set: conversations, say, of what a model is for.

It calibrates in a corpus's place, which goes on to evaluate.
"""

from __future__ import annotations

import json

from harness.calibration.corpus import Corpus, read, refuse_blank
from harness.config.checks import typed
from harness.config.errors import ConfigError, DataError
from harness.config.paths import expanded


class Samples(Corpus):
    """A calibration file of one's own, `data.calibration.path=FILE`.

    A `.txt` file is one text, a `.jsonl` file has a sample in the field "text" of each line.
    `text("calibration")` is a string for `.txt` and a list of strings for `.jsonl`;
    `windows.tokenize` takes either.
    """

    def __init__(self, path: str, name: str | None = None):
        typed("data.calibration.", {"path": path}, {"path": str})
        self.path = expanded(path)
        self.name = name or self.path.name

    def check(self) -> None:
        if self.path.suffix not in (".txt", ".jsonl"):
            raise ConfigError(
                f"data.calibration.path={self.path}: only .txt and .jsonl files are read"
            )
        self.text("calibration")
        refuse_blank(self.path, "data.calibration.path")

    def text(self, part: str) -> str | list[str]:
        if part != "calibration":
            raise ConfigError(
                f"data.calibration.path={self.path} only calibrates; there is no {part} text in it"
            )
        if not self.path.is_file():
            raise DataError(
                f"data.calibration.path={self.path} is not a file; "
                "give one, or null to calibrate on the data set"
            )
        content = read(self.path, "data.calibration.path")
        return content if self.path.suffix == ".txt" else self._samples(content)

    def _samples(self, content: str) -> list[str]:
        """The samples of a .jsonl file's content; empty lines are none."""
        samples = []
        # not splitlines(): a JSON string may hold a line separator that it would split at
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                sample = None
            if not isinstance(sample, str):
                raise DataError(
                    f'data.calibration.path={self.path} line {number}: expected {{"text": "..."}}'
                )
            samples.append(sample)
        if not any(sample.strip() for sample in samples):
            raise DataError(f"data.calibration.path={self.path}: every sample is empty")
        return samples
