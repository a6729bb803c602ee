"""PCA leaves the logits alone, and its axes are those of the covariance they were fitted on."""

import pytest
import torch
from prepared import WINDOWS, draw, every_model, moved, prepared, put, subject_of
from preserved import shape_of

from harness.linalg.stiefel import deviation, random_orthogonal
from harness.transforms.pca import PCA, principal_axes
from harness.transforms.sampling import Covariance


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "site"},
        {"block": 48},
        {"post_hadamard": True},
        {"head": False},
        {"scope": "site", "block": 12, "post_hadamard": True, "center": False},
    ],
    ids=str,
)
def test_pca_keeps_logits(family, tie, options):
    adapter, before = prepared(family, tie, fuse=False)
    placement = put(adapter, PCA(**options))
    assert len(placement.online) == (4 if options.get("scope") == "site" else 8) + options.get(
        "head", True
    )
    assert moved(adapter, before) < 1e-10


def test_principal_axes_diagonalise_what_they_were_fitted_on():
    """128 tokens at sites of 192 and more: C is rank deficient, and the axes are orthonormal all
    the same."""
    adapter, _ = prepared("qwen3")
    subject, context = subject_of(adapter), shape_of(adapter)
    where = [*context.widths, "head_in"]
    seen = subject.observe(lambda layer, site, n: Covariance(n, True), where, "")
    axes, even = (PCA(post_hadamard=h).fit(context, subject).online for h in (False, True))
    assert len(seen) == 9 and WINDOWS.numel() < 192
    for key, c in seen.items():
        v, trace = axes[key].encoder, float(c.diagonal(dim1=-2, dim2=-1).sum())
        assert deviation(v) < 1e-10
        rotated = (v.mT @ c @ v)[0]
        variances = rotated.diagonal()
        assert float((rotated - variances.diag()).abs().max()) < 1e-8 * trace
        assert (variances.diff() < 1e-12 * trace).all()
        assert (v.gather(-2, v.abs().argmax(-2, keepdim=True)) > 0).all() and torch.equal(
            v, principal_axes(c)
        )
        for seed in range(3):
            r = random_orthogonal(len(rotated), draw(seed))
            assert (
                (r.T @ c[0] @ r).diagonal().cumsum(0) <= variances.cumsum(0) + 1e-12 * trace
            ).all()
        spread = (even[key].encoder.mT @ c @ even[key].encoder)[0].diagonal()
        assert float(spread.std()) < 1e-10 * trace < float(variances.std())
