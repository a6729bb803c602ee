"""`--model harness`: a checkpoint as lm-eval reads one of transformers, loaded by transformers.

It differs from `--model hf` in three points: `harness` is imported, by which transformers loads
checkpoints of export=harness; a transform_config is run, of a folder and of a hub's repository
alike; and requests are not padded to a batch where an activation's scale spans tokens, for padding
would be part of it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from harness.checkpoints import online_reader
from harness.evaluation.zeroshot import together
from harness.libraries.transformers import folder_of

PLACE = ("subfolder", "cache_dir", "token", "local_files_only")  # what else says where files lie


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
        place = {key: options[key] for key in PLACE if key in options}
        folder = folder_of(pretrained, revision=lm.revision, **place)
        if folder is not None:
            online_reader.run(lm.model, folder)
        if together(lm.model, 2) == 1:
            lm.batch_size_per_gpu = 1
