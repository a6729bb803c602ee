"""Two runs on the same documents and windows: whether what separates them is more than chance.

What both saw is paired, so its own difficulty drops out and much smaller differences show than two
standard errors would. The p values speak of other documents and windows, not of other seeds;
neighbouring windows of one article are not quite independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from harness.config.extras import need
from harness.evaluation.records import stored
from harness.report.rows import final_stage, last, samples
from harness.report.settings import dotted

if TYPE_CHECKING:
    import numpy

METRICS = ("acc_norm", "acc", "exact_match")  # 0 or 1 a document; the first that both runs have
# Windows up to which all 2^n sign flips are enumerated: a million sums, some ten milliseconds.
EXACT = 20


def flips(a: Sequence[Mapping], b: Sequence[Mapping]) -> dict:
    """Zero-shot answers of two runs, from [{"doc", "acc", "acc_norm"}] each, matched by document.

    {"metric", "n", "a", "b": accuracies, "lost": right in a and wrong in b, "won": the reverse,
    "p"}: the exact two-sided McNemar test. Of the documents that flipped, either way is as likely
    if the runs are equally good: a binomial of 1/2, valid at any n. Raises ValueError without a
    document or a metric in common.
    """
    first, second = ({sample["doc"]: sample for sample in samples} for samples in (a, b))
    shared = [doc for doc in first if doc in second]
    if not shared:
        raise ValueError("no document in common")
    metric = next(
        (m for m in METRICS if all(m in side[doc] for side in (first, second) for doc in shared)),
        None,
    )
    if metric is None:
        raise ValueError(f"none of {', '.join(METRICS)} in all documents of both")
    right = [(first[doc][metric] == 1, second[doc][metric] == 1) for doc in shared]
    lost = right.count((True, False))
    won = right.count((False, True))
    n = len(right)
    accuracies = {"a": sum(x for x, _ in right) / n, "b": sum(y for _, y in right) / n}
    return {
        "metric": metric,
        "n": n,
        **accuracies,
        "lost": lost,
        "won": won,
        "p": _mcnemar(lost, won),
    }


def losses(a: Sequence[float], b: Sequence[float]) -> dict:
    """Mean losses of the same windows under two runs, in nats.

    {"n", "difference": mean of b - a, "se": its standard error (None for one window), "ratio":
    perplexity of b over that of a, "p", "test", "least": the smallest p that the test can give}.

    Up to 20 windows the sign-flip permutation test of the mean, exact by enumeration: it supposes
    only that a window's difference is as likely to have either sign when the runs are equally good,
    and at n windows gives no p below 2 / 2^n (2/256 at 8). Beyond that the paired t test of the
    same mean, close to normal by then; Wilcoxon's would judge another quantity than the one shown.
    Raises ValueError for unequal lengths or no windows.
    """
    import numpy

    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} windows cannot be paired")
    differences = numpy.asarray(b, float) - numpy.asarray(a, float)
    n = len(differences)
    if n == 0 or not numpy.isfinite(differences).all():
        raise ValueError("no windows" if n == 0 else "a loss is not finite")
    mean = float(differences.mean())
    exact = n <= EXACT
    return {
        "n": n,
        "difference": mean,
        "se": float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        "ratio": math.exp(mean),
        "p": (_sign_flip if exact else _t)(differences),
        "test": "sign-flip" if exact else "t",
        "least": 2.0 ** (1 - n) if exact else 0.0,
    }


def compare(a: dict, b: dict) -> dict[str, dict[str, dict]]:
    """{"corpora": {corpus: `losses`}, "tasks": {task: `flips`}} of all that the last stages of two
    rows share.

    What cannot be paired has {"error": why} in its place; samples that were not kept are left out.
    """
    corpora: dict[str, dict] = {}
    tasks: dict[str, dict] = {}
    ours = last(a)
    theirs = last(b)
    for corpus, windows in (ours.get("losses") or {}).items():
        others = (theirs.get("losses") or {}).get(corpus)
        if others is not None:
            corpora[corpus] = _window_pairs(windows, others, _length(ours), _length(theirs))
    for source in dict.fromkeys(one.source for one in stored(a) if one.stage == final_stage(a)):
        answers = (samples(a, source), samples(b, source))
        if all(answers):
            tasks[source] = _tried(flips, *answers)
    return {"corpora": corpora, "tasks": tasks}


def settings(a: dict, b: dict) -> dict[str, tuple]:
    """{dotted setting: (of a, of b)} of those in which two rows differ; `-` where one has no such
    setting or no config.yaml."""
    ours = dotted(a)
    theirs = dotted(b)
    sides = {
        key: (ours.get(key, "-"), theirs.get(key, "-")) for key in dict.fromkeys([*ours, *theirs])
    }
    return {key: (left, right) for key, (left, right) in sides.items() if left != right}


def _window_pairs(a: list, b: list, *lengths: int | None) -> dict:
    if None not in lengths and len(set(lengths)) > 1:
        return {"error": f"windows of {lengths[0]} and of {lengths[1]} tokens cannot be paired"}
    return _tried(losses, a, b)


def _tried(test: Callable[..., dict], *sides: object) -> dict:
    """A record of another shape is told like one that cannot be paired."""
    try:
        return test(*sides)
    except (ValueError, TypeError, KeyError) as error:
        return {"error": str(error)}


def _length(stage: dict) -> int | None:
    """Tokens a window: all windows of a stage are equally long."""
    count = sum(map(len, stage["losses"].values()))
    if not count or not stage.get("tokens"):
        return None
    return stage["tokens"] // count


def _mcnemar(lost: int, won: int) -> float:
    if lost + won == 0:
        return 1.0
    need("scipy", "McNemar's test")
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue)


def _sign_flip(differences: numpy.ndarray) -> float:
    """Share of the 2^n signed sums at least as far from zero as the one observed. differences: [n],
    n <= EXACT."""
    import numpy

    sums = numpy.zeros(1)
    for difference in differences:
        sums = numpy.concatenate([sums + difference, sums - difference])
    # Sums of equal size must count as ties whatever their order of addition.
    rounding = 1e-12 * numpy.abs(differences).sum()
    return float((numpy.abs(sums) >= abs(differences.sum()) - rounding).mean())


def _t(differences: numpy.ndarray) -> float:
    """Two-sided paired t test of a zero mean. differences: [n]."""
    need("scipy", f"the t test of more than {EXACT} windows")
    from scipy.stats import t

    error = differences.std(ddof=1) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(2 * t.sf(abs(differences.mean()) / error, len(differences) - 1))
