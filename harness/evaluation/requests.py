"""lm-eval's requests over several ranks: each answers those of its share of the documents.

All else that lm-eval does, every rank does: it takes no time beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness.parallel import Ranks

T = TypeVar("T")


class SharedLM(HFLM):
    """HFLM whose answers are those of all ranks."""

    def __init__(self, ranks: Ranks, **settings: Any):
        super().__init__(**settings)
        self.ranks = ranks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list:
        return self._shared(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list:
        return self._shared(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list:
        return self._shared(super().generate_until, requests, disable_tqdm)

    def _shared(
        self, answer: Callable[..., Sequence[T]], requests: Sequence[Instance], disable_tqdm: bool
    ) -> list[T]:
        """The answers to all requests; those of one document, which share a context, are one's."""
        documents = list(dict.fromkeys(request.doc_id for request in requests))
        mine = set(self.ranks.share(documents))
        places = [place for place, one in enumerate(requests) if one.doc_id in mine]
        own = answer([requests[place] for place in places], disable_tqdm=disable_tqdm)
        answers: dict[int, T] = {}
        for found in self.ranks.gather(dict(zip(places, own))):
            answers |= found
        return [answers[place] for place in range(len(requests))]
