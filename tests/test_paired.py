"""Two runs compared on the same windows and documents: paired tests, against counting."""

import itertools
import math
import random

import pytest
from stored_runs import root, stored

from harness.report.paired import compare, flips, losses
from harness.report.rows import row
from harness.store import Run

__all__ = ["root"]  # a fixture


def samples(acc, acc_norm=None) -> list[dict]:
    norms = [{}] * len(acc) if acc_norm is None else [{"acc_norm": x} for x in acc_norm]
    return [{"doc": i, "acc": x, **norm} for i, (x, norm) in enumerate(zip(acc, norms))]


def test_flips_by_hand():
    """One lost and five won: 2 (1 + 6) / 2^6."""
    a, b = samples([1, 0, 0, 0, 0, 0, 1, 0]), samples([0, 1, 1, 1, 1, 1, 1, 0])
    found = flips(a, [*reversed(b), {"doc": 99, "acc": 1}])
    assert found == {
        "metric": "acc",
        "n": 8,
        "a": 2 / 8,
        "b": 6 / 8,
        "lost": 1,
        "won": 5,
        "p": pytest.approx(14 / 64),
    }
    assert flips(a, a)["p"] == 1
    assert flips(samples([0] * 8), samples([1] * 8))["p"] == pytest.approx(2 / 256)
    with pytest.raises(ValueError, match="no document"):
        flips(a, [{"doc": 99, "acc": 1}])


def test_flips_take_the_normalized_answer_where_both_have_it():
    plain, both = samples([1, 1]), samples([1, 1], [0, 1])
    assert (flips(both, both)["metric"], flips(both, both)["a"]) == ("acc_norm", 0.5)
    assert (flips(plain, both)["metric"], flips(plain, both)["b"]) == ("acc", 1)


@pytest.mark.parametrize("n", [1, 2, 6, 9])
def test_sign_flips_equal_enumeration(n):
    generator = random.Random(n)
    a, b = ([generator.gauss(3, 0.1) for _ in range(n)] for _ in range(2))
    apart = [y - x for x, y in zip(a, b)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, apart)))
        for signs in itertools.product((1, -1), repeat=n)
    ]
    assert losses(a, b)["p"] == sum(s >= abs(sum(apart)) - 1e-12 for s in sums) / 2**n
    assert losses(a, b)["ratio"] == pytest.approx(math.exp(sum(b) / n) / math.exp(sum(a) / n))


def test_window_losses_by_hand():
    """Eight windows allow 2/256 and no less. Six of eight steps up: as far out lie 2 (1 + 8 + 28)
    of 256 sums, ties and all."""
    zeros = [3.0] * 8
    found = losses(zeros, [3.1, 3.2, 3.3, 3.1, 3.2, 3.3, 3.1, 3.5])
    assert found["p"] == found["least"] == 2 / 256
    assert (found["difference"], found["se"]) == (
        pytest.approx(0.225),
        pytest.approx(0.13887 / math.sqrt(8), rel=1e-3),
    )
    assert losses([0.0] * 8, [0.1] * 6 + [-0.1] * 2)["p"] == 74 / 256
    assert (
        losses([0.0] * 5, [0.1, 0.1, 0.1, 0.3, -0.1])["p"] == 10 / 32
    )  # all seven tenths but one: ties only up to rounding
    with pytest.raises(ValueError, match="8 and 6 windows"):
        losses(zeros, zeros[:6])
    with pytest.raises(ValueError, match="not finite"):
        losses([3.0, None], [3.0, 3.0])


def test_many_windows_take_the_t_test():
    from scipy.stats import ttest_rel

    generator = random.Random(1)
    a = [generator.gauss(3, 1) for _ in range(21)]
    b = [x + generator.gauss(0.05, 0.1) for x in a]
    assert losses(a, b)["p"] == pytest.approx(ttest_rel(b, a).pvalue)
    assert losses(a, b)["p"] == pytest.approx(
        losses(a[:20], b[:20])["p"], abs=0.05
    )  # no jump where the test changes


@pytest.mark.parametrize("n", [1, 8, 20, 21, 145])
def test_a_run_against_itself(n):
    same = [3.0 + i / 7 for i in range(n)]
    found = losses(same, same)
    assert (found["p"], found["ratio"], found["difference"]) == (1, 1, 0)


def test_compare_reads_what_both_runs_keep(root):
    a, b = (
        row(Run(root / name))
        for name in ("tiny-nvfp4-identity-gptq-aaaaaaaaa1", "tiny-nvfp4-hadamard-rtn-aaaaaaaaa2")
    )
    found = compare(a, b)
    assert found["corpora"]["wikitext-2"]["difference"] == pytest.approx(0.3)
    assert found["corpora"]["wikitext-2"]["p"] == 2 / 256
    answers = found["tasks"]["arc_easy"]
    assert (answers["metric"], answers["n"], answers["won"]) == ("acc_norm", 40, 0)
    assert answers["lost"] > 5 and answers["p"] == pytest.approx(2 * 0.5 ** answers["lost"])
    assert {p["p"] for kind in compare(a, a).values() for p in kind.values()} == {1}
    other = row(Run(stored(root, "tiny-nvfp4-identity-rtn-aaaaaaaaa5", windows=6)))
    assert "8 and 6 windows" in compare(a, other)["corpora"]["pydoc"]["error"]
    b["stages"]["quantized"]["tokens"] //= 2
    assert "windows of 2048 and of 1024 tokens" in compare(a, b)["corpora"]["pydoc"]["error"]
