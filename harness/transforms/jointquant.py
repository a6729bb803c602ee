"""jointquant: one R1 for all layers at once, by the sum of their whip losses (whip.py).

    min over R1  of  sum over layers l of  whip(X_l R1)

Every layer counts alike, however many tokens it has. SmoothQuant is stacked by default.

Source: the JointQuant code: SGD with momentum .9, lr 1e-3, 10 epochs with a cosine, gradient norm
clipped at 1, one full-batch step an epoch, which hardly leaves the Hadamard start (preset jq_seed).
Differences: by default a step takes `batch` tokens of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.transforms.whip import Whip


class JointQuant(Whip):
    """Whip with the joint schedule by default."""

    def __init__(
        self,
        r1: Mapping,
        r2: Mapping | None,
        schedule: str = "joint",
        r1_targets: Sequence[str] = ("up",),
        max_tokens_per_site: int = 4096,
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
            sinks=sinks,
            r3=r3,
            r4=r4,
            random_signs=random_signs,
        )
