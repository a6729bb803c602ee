"""dartquant: R1 and R2 from the whip loss (whip.py), tokens of all layers pooled.

    min over R1  of  whip(X R1),    X the rows of all layers: no backward pass through the model

Source: DartQuant (arXiv 2511.04063): SGD with momentum .9, R1 10 epochs over a random tenth of the
pool, R2 one matrix a key/value head. Differences: rows are drawn evenly from a capped reservoir a
site instead of stored files, first tokens take a share of every batch, QR-Orth has the sign fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.transforms.whip import Whip


class DartQuant(Whip):
    """Whip with the pooled schedule by default."""

    def __init__(
        self,
        r1: Mapping,
        r2: Mapping | None,
        schedule: str = "pooled",
        r1_targets: Sequence[str] = ("q", "up"),
        max_tokens_per_site: int = 2048,
        share: float = 0.1,
        sinks: float = 0.1,
        r3: str | int | bool = "auto",
        r4: str | bool = "auto",
        random_signs: bool = True,
    ):
        super().__init__(
            schedule,
            r1_targets,
            max_tokens_per_site,
            r1,
            r2,
            share=share,
            sinks=sinks,
            r3=r3,
            r4=r4,
            random_signs=random_signs,
        )
