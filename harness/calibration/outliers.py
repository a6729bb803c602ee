"""How heavy the tails of a model's activations are, site by site: what rotations and scalings are
for.

    max / median of |x|        kurtosis = mean (x - mu)^4 / sigma^4  (3 for a normal variable)

over all tokens and features a site's quantizer would see, and a histogram of log2 |x|. Values are
taken before any quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.calibration.stream import Stream
from harness.models.adapter import Adapter

EDGES = torch.arange(-20.0, 12.5, 0.5)  # of log2 |x|: 64 bins of half an octave
WINDOWS = 4  # calibration windows looked at
MEDIAN_OF = (
    1 << 20
)  # values; a median needs no more. An odd stride visits all features, whatever their order


@torch.no_grad()
def profiles(adapter: Adapter, windows: Tensor) -> dict[tuple[int, str], dict]:
    """{(layer, site): {"max_over_median", "kurtosis", "counts": [64]}} of a swapped model; windows:
    token ids [N, L].
    """
    stream, found = Stream(adapter, windows[:WINDOWS]), {}
    for layer, block in enumerate(adapter.blocks):
        with adapter.open(layer):
            for site, activations in stream.walk(block):
                encode = block.get_submodule(site.linears[0]).site.encode
                seen = [encode(x).float().flatten() for x in activations]
                found[layer, site.name] = _profile(torch.cat(seen))
    return found


def outliers(before: dict[tuple[int, str], dict], after: dict[tuple[int, str], dict]) -> dict:
    """{"edges" [65] of |x|, "sites" {site: {"before", "after": counts [64] over all layers}},
    "rows": [one a layer and site]} from the profiles of a model before and after its transform.
    """
    sites = {site: {} for _, site in before}
    for site, kept in sites.items():
        for when, profile in (("before", before), ("after", after)):
            counts = [one["counts"] for (_, name), one in profile.items() if name == site]
            kept[when] = [sum(bins) for bins in zip(*counts)]
    rows = [
        {
            "layer": layer,
            "site": site,
            **{
                when: {k: v for k, v in profile[layer, site].items() if k != "counts"}
                for when, profile in (("before", before), ("after", after))
            },
        }
        for layer, site in before
    ]
    return {"edges": (2**EDGES).tolist(), "sites": sites, "rows": rows}


def _profile(x: Tensor) -> dict:
    """x [n] float32, overwritten."""
    fourth = x - x.mean()
    variance = fourth.square_().mean()
    kurtosis = float(fourth.square_().mean() / variance.square().clamp_min(1e-30))
    size = x.abs_()
    largest, median = float(size.max()), float(size[:: len(size) // MEDIAN_OF | 1].median())
    bins = size.log2_().sub_(EDGES[0]).mul_(2).floor_().clamp_(0, len(EDGES) - 2).nan_to_num_(0)
    counts = torch.bincount(bins.long(), minlength=len(EDGES) - 1)
    return {
        "max_over_median": largest / max(median, 1e-12),
        "kurtosis": kurtosis,
        "counts": counts.tolist(),
    }
