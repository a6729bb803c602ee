"""Perplexity of the run's checkpoint in vLLM, over the run's own windows.

Loaded after it is written (export), by a python of its own, for vLLM asks for packages that this
project's environment has otherwise. A folder of export=harness is computed there with our formats'
arithmetic (engines/), any other by vLLM's own kernels. `here` is the perplexity of the same windows
as the run evaluated it, `off` how far vLLM's is from it, relatively. Imports no torch.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from harness.config import options
from harness.config.checks import integer, one_of
from harness.config.errors import ConfigError, DataError
from harness.config.paths import expanded
from harness.evaluation.base import Display, Evaluation, Figures, Subject
from harness.structure.facts import read_object

if TYPE_CHECKING:
    from harness.formats import KVCache

SCRIPT = Path(__file__).parent.parent / "engines" / "vllm_losses.py"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class VLLM(Evaluation):
    """windows: the first so many of each corpus, None all; dtype: that vLLM computes in, None as
    config.json says; python: of an environment that has vLLM, relative to this project's root."""

    windows: int | None = 2
    dtype: str | None = None
    python: str = ".venv-vllm/bin/python"

    displays = {
        "ppl": Display("vLLM", title="perplexity in vLLM", lower_is_better=True),
        "here": Display("here", title="perplexity here, of the same windows", minor=True),
        "off": Display("off", title="vLLM's from it", digits=2, percent=True, minor=True),
    }

    def fingerprint(self) -> dict:
        """Not where vLLM is installed."""
        return {"vllm": [self.windows, self.dtype]}

    def check(self) -> None:
        where = "eval.evaluations.vllm"
        integer(f"{where}.windows", self.windows, optional=True)
        if self.dtype is not None:
            one_of(f"{where}.dtype", self.dtype, DTYPES)
        if not self._program.is_file():
            raise ConfigError(
                f"{where}.python={self.python}: is no program; `make vllm` makes the environment, "
                "or name the python of one that has vLLM."
            )

    def check_export(self, layout: str, family: object, kv: KVCache | None) -> None:
        from harness.models.engine import refusal

        if layout == "none":
            raise ConfigError(
                "eval=vllm with export=none: vLLM loads a checkpoint; set export=harness, or "
                "export=compressed_tensors for vLLM's own kernels."
            )
        why = refusal(family, kv) if layout == "harness" else None
        if why is not None:
            raise ConfigError(f"eval=vllm with {why}, or eval=perplexity.")

    def measure(self, subject: Subject) -> Figures:
        return {}  # of the checkpoint alone

    def exported(self, subject: Subject, folder: Path) -> Figures:
        from harness.evaluation.perplexity import perplexity

        windows = {corpus: text[: self.windows] for corpus, text in subject.texts.items()}
        asked = {
            "folder": str(folder.resolve()),
            "dtype": self.dtype or read_object(folder / "config.json")["dtype"],
            "windows": {corpus: text.tolist() for corpus, text in windows.items()},
        }
        with subject.progress("evaluate in vLLM", 1) as advance:
            found = self._losses(asked)
            advance()
        figures = {}
        for corpus, text in windows.items():
            own = subject.losses[corpus]
            ppl, here = (
                perplexity(losses, text.shape[1])
                for losses in (own.new_tensor(found[corpus]), own[: self.windows])
            )
            figures[corpus] = {"ppl": ppl, "here": here, "off": ppl / here - 1}
        return figures

    @property
    def _program(self) -> Path:
        return (options.checkout() or Path.cwd()) / expanded(self.python)

    def _losses(self, asked: dict) -> dict[str, list[float]]:
        """{corpus: summed loss of each window}, in nats."""
        with TemporaryDirectory() as folder:
            request, answer = (Path(folder) / name for name in ("request.json", "answer.json"))
            request.write_text(json.dumps(asked))
            words = [str(self._program), str(SCRIPT), str(request), str(answer)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode or not answer.is_file():
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                # its shutdown may warn after the error
                told = next((line for line in reversed(lines) if "Error" in line), lines[-1])
                raise DataError(f"vLLM refuses {asked['folder']}: {told}")
            return json.loads(answer.read_text())["losses"]
