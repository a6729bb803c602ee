"""`--model harness`: a checkpoint as lm-eval reads one of transformers, loaded by transformers.

It differs from `--model hf` in three points: `harness` is imported, by which transformers loads
checkpoints of export=harness; a folder's transform_config is run; and requests are not padded to a
batch where an activation's scale spans tokens, for padding would be part of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from harness.checkpoints import online_reader
from harness.evaluation.zeroshot import together


@register_model("harness")
class HarnessLM(HFLM):
    """pretrained: the folder, or a hub id; options: those of lm-eval's `hf`."""

    def __init__(self, pretrained: str, batch_size: int | str = 1, **options):
        # what hears stands among those that translate, in lm-eval's view
        options.setdefault("backend", "causal")
        # lm-eval's decorators hide what its own class takes and has
        own = {"pretrained": pretrained, "batch_size": batch_size}
        super().__init__(**own, **options)
        lm: Any = self
        if Path(pretrained).is_dir():
            online_reader.run(lm.model, Path(pretrained))
        if together(lm.model, 2) == 1:
            lm.batch_size_per_gpu = 1
