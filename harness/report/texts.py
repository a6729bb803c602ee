"""What the model of each stage said to the prompts of a run (evaluation/generate.py)."""

from __future__ import annotations

from collections.abc import Mapping

from harness.evaluation.generate import TEXTS


def said(stages: Mapping[str, Mapping]) -> list[dict[str, str]]:
    """One row a prompt: {"prompt", stage: how it went on}, of the stages that were asked."""
    texts = {stage: fields[TEXTS] for stage, fields in stages.items() if fields.get(TEXTS)}
    prompts = dict.fromkeys(prompt for own in texts.values() for prompt in own)
    return [
        {"prompt": prompt, **{stage: own[prompt] for stage, own in texts.items() if prompt in own}}
        for prompt in prompts
    ]
