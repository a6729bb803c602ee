"""What the model says: a few prompts continued greedily, beside what the untouched model says.

    x_t = argmax_v p(v | prompt, x_1 .. x_{t-1}),    t = 1 .. tokens, or until the model ends

No number: a look at the model, which perplexity replaces and this does not. Greedy, for a sample
would differ by chance, not by the method. Prompts are continued one by one, unpadded, as they
stand: without a chat template, with what the tokenizer itself puts before a text. Keys and values
are quantized as in every forward of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.config.checks import integer, typed
from harness.config.errors import ConfigError
from harness.evaluation.base import Evaluation, Figures, Subject

if TYPE_CHECKING:
    import torch

    from harness.models.adapter import Adapter

TEXTS = "texts"  # of a stage's record: {prompt: how it goes on}


@dataclass(frozen=True)
class Generate(Evaluation):
    """prompts: texts; tokens: the most that are added to each."""

    prompts: tuple[str, ...]
    tokens: int = 32

    @classmethod
    def of(cls, section: Mapping | None) -> Generate | None:
        """From `eval.generate`; None where it is off. Raises ConfigError."""
        if section is None:
            return None
        fields = {"prompts": list[str], "tokens": int}
        typed("eval.generate.", section, fields, needed=("prompts",))
        prompts = section["prompts"]
        if not prompts or not all(prompts) or len(set(prompts)) < len(prompts):
            raise ConfigError(
                f"eval.generate.prompts={prompts}: needs a list of texts, each once, e.g. "
                "['The capital of France is']."
            )
        integer("eval.generate.tokens", section.get("tokens", 32))
        return cls(**{**section, "prompts": tuple(prompts)})

    def fingerprint(self) -> dict:
        """What is asked, and for how much."""
        return {"generate": [list(self.prompts), self.tokens]}

    def measure(self, subject: Subject) -> Figures:
        own = subject.ranks.share(self.prompts)
        said = []
        with subject.progress(f"continue {subject.stage}", len(own)) as advance:
            for prompt in own:
                ids = subject.tokenizer(prompt, return_tensors="pt").input_ids
                tokens = continuation(subject.adapter, ids, self.tokens, subject.amp)
                said.append(subject.tokenizer.decode(tokens, skip_special_tokens=True))
                advance()
        subject.details[TEXTS] = dict(zip(self.prompts, subject.ranks.merged(said)))
        return {}


def continuation(
    adapter: Adapter, ids: torch.Tensor, tokens: int, amp: torch.dtype | None = None
) -> torch.Tensor:
    """The tokens [T <= tokens] that a model adds to ids [1, L], each the likeliest.

    amp: autocast dtype of its forward.
    """
    import torch
    from transformers import GenerationConfig

    model = adapter.model
    own = model.generation_config
    ends = None if own is None else own.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=first,
    )
    ids = ids.to(adapter.device)
    with torch.no_grad(), torch.autocast(ids.device.type, amp, enabled=amp is not None):
        found = model.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
    return found[0, ids.shape[1] :]
