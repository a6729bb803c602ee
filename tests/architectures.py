"""What the harness does with every architecture of the zoo, one row each.

    python tests/architectures.py             writes sweeps/ARCHITECTURES.md, in about six minutes
    python tests/architectures.py NAME ...    prints the page of these

A cell is a run of a tiny model: done, refused with a reason (ConfigError, DataError), or a fault.
What is done is held to perplexities by the model's own forward; exit status 1: one is another.
"""

import io
import math
import re
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
import zoo
from composed import ROOT, small
from torch import nn

import harness
from harness.calibration.windows import tokenize, windows
from harness.config.errors import ConfigError, DataError
from harness.models.adapter import structure_of
from harness.models.tiny import byte_tokenizer
from harness.pipeline.job import execute
from harness.transforms.smoothquant import SmoothQuant

ON = {"r1": "random", "r2": "true", "r3": "on", "r4": "on"}
FLOAT = ("format=none", "solver=none")
NVFP4 = ("format=nvfp4", "solver=gptq")
SAME = 1e-4  # between perplexities of one function, relative; of float32 streams a tenth
SMALLER = {"gemma4_text": {"vocab_size_per_layer_input": 258}}  # not a table of 1 GiB
SMALLER |= {"kimi_linear": {"num_local_experts": 4}}  # not 256
COLUMNS = ("R1", "R2", "R3", "R4", "smoothing", "KV", "NVFP4", "export")
HEADER = f"""# Architectures

`python tests/architectures.py` wrote this file: Python {sys.version.split()[0]}, torch
{version("torch")}, transformers {version("transformers")}, float32 on a CPU. Each row is a tiny
model of tests/zoo with random weights. [n]: the reason is the n-th one below; **fault**: an
error that no check had foreseen; -: nothing is placed.

R1 to R4: `transform=quarot` with that alone, largest change of a logit against the largest logit.
Smoothing: activations that `transform=smoothquant` scales. KV: `format.kv.bits=4`. NVFP4: how much
of the blocks' matrices `format=nvfp4 solver=gptq` quantizes. Export: its checkpoint
(`export=harness`) loads back. Stream: difference of the walk block by block and the forward.

| architecture | residual | {" | ".join(COLUMNS)} | stream |
{"| --- " * (len(COLUMNS) + 3)}|"""


@dataclass
class Cell:
    """What became of a run: done | refused | fault. text: what is shown of it, or why."""

    state: str
    text: str
    metrics: dict = field(default_factory=lambda: {"notes": {}})


class Bench:
    """One architecture: its model in a folder, its structure, and runs of it."""

    def __init__(self, name: str, root: Path):
        self.name = name
        self.root = root
        self.folder = root / name
        self.model = zoo.make(name, **SMALLER.get(name, {}))
        self.model.save_pretrained(self.folder)
        byte_tokenizer().save_pretrained(self.folder)
        self.wrong: dict[str, None] = {}
        self.structure = None
        with suppress(Exception):  # every run says why
            self.structure = structure_of(self.model.config)

    def run(self, *settings: str) -> Cell:
        """A run with these settings; wrong numbers of it are noted."""
        settings = ("model=hf", f"model.path={self.folder}", "data.bos=none", *settings)
        try:
            with redirect_stdout(io.StringIO()):
                outcome = execute(*small(self.root, *settings))
        except (ConfigError, DataError) as error:
            return Cell("refused", self._short(str(error)))
        except Exception as error:
            return self._fault(f"{type(error).__name__}: {error}", traceback.format_exc())
        if outcome.status != "done":
            return self._fault(str(outcome.error), outcome.run.status["traceback"])
        cell = Cell("done", "yes", outcome.metrics)
        for stage in sorted({"baseline", "transformed"} & set(outcome.metrics["stages"])):
            self._hold(cell, stage, self.model)
        if outcome.metrics["notes"].get("stream", 0) > SAME / 10:
            self.wrong[f"{self.name}: blocks are not handed on all that they need"] = None
        return cell

    def rotated(self, part: str) -> Cell:
        """A run with one rotation."""
        places = (f"transform.{r}={on if r == part else 'false'}" for r, on in ON.items())
        cell = self.run(*FLOAT, "transform=quarot", *places)
        if cell.state == "done":
            notes = cell.metrics["notes"]
            placed = part.upper() in notes["rotations"]
            cell.text = f"{notes['gate']['max'] / self.largest:.0e}" if placed else "-"
        return cell

    def smoothed(self) -> Cell:
        """A run with smoothquant: how many of the activations of all blocks it scales."""
        cell = self.run(*FLOAT, "transform=smoothquant")
        if cell.state == "done":
            layers = range(self.structure.layers)
            read = {(i, site.activation) for i in layers for site in self.structure.expanded(i)}
            found = {name: self.structure.merges(name) for name in SmoothQuant().sites}
            cell.text = f"{sum(i in found.get(name, ()) for i, name in read)} of {len(read)}"
        return cell

    def quantized(self) -> dict[str, Cell]:
        """NVFP4 by GPTQ: how much of the blocks' matrices; and its checkpoint loaded back."""
        exported = self.run(*NVFP4, "export=harness", f"export.path={self.root / 'exports'}")
        solved = replace(exported) if exported.state == "done" else self.run(*NVFP4)
        if solved.state == "done":
            weights = sum(layer["weights"] for layer in solved.metrics["layers"])
            blocks = self.model.get_submodule(self.structure.blocks).parameters()
            solved.text = f"{weights / sum(p.numel() for p in blocks if p.ndim > 1):.0%}"
        if exported.state == "done":
            try:
                loaded = harness.load(exported.metrics["export"]["path"])[0]
                self._hold(exported, "quantized", loaded)
            except Exception as error:
                exported = self._fault(str(error), traceback.format_exc())
        return {"NVFP4": solved, "export": exported}

    @torch.no_grad()
    def _hold(self, cell: Cell, stage: str, model: nn.Module) -> None:
        """Note it where an evaluated perplexity is not that of this model's forward."""
        ids = tokenize(byte_tokenizer(), (self.root / "text" / "test.txt").read_text())
        losses = []
        for window in windows(ids, 128, 2):  # as in composed.small
            logits = model(window[None], use_cache=False).logits[0].double()
            losses.append(nn.functional.cross_entropy(logits[:-1], window[1:]))
            self.largest = float(logits.abs().max())
        expected = math.exp(torch.stack(losses).mean())
        found = cell.metrics["stages"][stage]["ppl"]["pydoc"]
        if not abs(found / expected - 1) <= SAME:
            self.wrong[f"{self.name}, {stage}: perplexity {found:.2f}, not {expected:.2f}"] = None

    def _fault(self, error: str, trace: str) -> Cell:
        print(*trace.strip().splitlines()[-4:], sep="\n    ")
        return Cell("fault", self._short(error))

    def _short(self, message: str) -> str:
        """A reason in one line, without what names this model, numbers of one run, and ways out."""
        text = re.sub(r"\s+", " ", message.replace("|", "/"))
        text = re.sub(rf"model\.path=\S* |{self.root}\S*:? |\b{self.name}\b |^model: ", "", text)
        text = re.sub(r"^\s*\S+ with an? \w*: (its residual .*?, for )?", "", text)
        text = re.sub(r"[A-Z]\w+ (?=has no attribute)| by up to .*?(?=;)", "", text)
        return re.split(r"[.;,:]+ (?:so that|Use|set|leave|copy|give|Errors|\[\{)", text)[0]


def main(names: list[str]) -> int:
    """Print a row for each architecture, and write the page where all were asked for."""
    reasons: dict[str, int] = {}
    states: dict[str, Counter] = {column: Counter() for column in COLUMNS}
    rows, wrong = [], {}
    for name in names or zoo.ZOO:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, Path(folder))
            cells = {part.upper(): bench.rotated(part) for part in ON}
            cells |= {"smoothing": bench.smoothed(), "KV": bench.run(*FLOAT, "format.kv.bits=4")}
            cells |= bench.quantized()
        texts = [name, str(bench.structure.residual.group) if bench.structure else ""]
        for column, cell in cells.items():
            states[column][cell.state] += 1
            if cell.state != "done":
                number = reasons.setdefault(cell.text, len(reasons) + 1)
                cell.text = f"{'no' if cell.state == 'refused' else '**fault**'} [{number}]"
            texts.append(cell.text)
        stream = cells["NVFP4"].metrics["notes"].get("stream")
        rows.append(f"| {' | '.join(texts)} | {'' if stream is None else f'{stream:.0e}'} |")
        print(rows[-1], flush=True)
        wrong |= bench.wrong
    page = [HEADER, *rows, "", *(f"{i}. {reason}" for reason, i in reasons.items()), ""]
    for column, found in states.items():
        told = ", ".join(f"{count} {state}" for state, count in found.most_common())
        page.append(f"- {column}, {len(rows)} architectures: {told}")
    page += [f"- wrong numbers: {len(wrong)}", *(f"  - {text}" for text in wrong)]
    print(*page[len(rows) + 1 :], sep="\n")
    if not names:
        (ROOT / "sweeps" / "ARCHITECTURES.md").write_text("\n".join(page) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    with redirect_stderr(io.StringIO()):  # what transformers says of kernels and defaults
        sys.exit(main(sys.argv[1:]))
