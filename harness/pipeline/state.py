"""What is known of a run while it is computed: from its start, and once its model is loaded.

Imports no torch: a stored result is shown by a process that has none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.parallel import Ranks
from harness.pipeline.plan import Plan
from harness.report.progress import Reporter
from harness.store import Run, Store
from harness.tracking import Tracker

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from harness.evaluation.divergence import Reference
    from harness.models.source import BlockStorage
    from harness.pipeline.build import Components
    from harness.transforms import Placement


@dataclass
class Job:
    """A run from its start.

    plan, parts: what is computed, and by what; the scheme of parts changes once its formats are
    allocated. store, run: where results go. reporter: tells a person. tracker: told of curves,
    tables and the final numbers. metrics: the results so far, as metrics.json holds them.
    scratch: a folder that goes away at the end. ranks: the processes that compute it.
    """

    plan: Plan
    parts: Components
    store: Store
    run: Run
    reporter: Reporter
    tracker: Tracker
    metrics: dict
    scratch: Path
    ranks: Ranks

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and note in the store that it runs."""
        self.run.set_status(stage=name)
        self.run.event("stage", stage=name)
        start = time.perf_counter()
        yield
        # Added up: a stage may come twice, and a baseline from the store brings its own.
        seconds = self.metrics["seconds"].get(name, 0.0) + time.perf_counter() - start
        self.metrics["seconds"][name] = seconds
        self.run.save_metrics(self.metrics)


@dataclass
class LoadedJob(Job):
    """A run whose model is loaded; the model itself goes beside it, as an Adapter.

    amp: autocast dtype of forwards. offloaded: where the blocks are while they are not in use;
    None: in memory. texts: token ids {corpus: [W, L]} that are evaluated. placements: of the
    transforms that are placed, in their order. reference: the untouched model, taken before
    anything changes it.
    """

    tokenizer: PreTrainedTokenizerBase
    amp: torch.dtype | None
    offloaded: BlockStorage | None
    reference: Reference
    texts: dict[str, Tensor] = field(default_factory=dict)
    placements: list[Placement] = field(default_factory=list)
