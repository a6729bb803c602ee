"""How heavy the tails of a model's activations are, site by site.

Rotations and scalings are there to make them lighter. Two measures of them:

    max / median of |x|        kurtosis = mean (x - mu)^4 / sigma^4  (3 for a normal variable)

over all tokens and features a site's quantizer would see, and a histogram of log2 |x|. Values are
taken before any quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.calibration.stream import Stream
from harness.models.adapter import Adapter
from harness.parallel import ALONE, Ranks

EDGES = torch.arange(-20.0, 12.5, 0.5)  # of log2 |x|: 64 bins of half an octave
WINDOWS = 4  # calibration windows looked at
MEDIAN_OF = 1 << 20  # values; a median needs no more


@torch.no_grad()
def profiles(
    adapter: Adapter, windows: Tensor, ranks: Ranks = ALONE
) -> dict[tuple[int, str], dict]:
    """{(layer, site): {"max_over_median", "kurtosis", "counts": [64]}} of a swapped model.

    windows: token ids [N, L]; ranks: each passes its share of them and makes its share of the
    profiles, and has them all.
    """
    # experts as the router feeds them, together: one that got little adds little
    stream = Stream(adapter, windows[:WINDOWS], enough=0, ranks=ranks)
    keys: list[tuple[int, str]] = []
    own: list[dict] = []

    def profile(layer: int, name: str, values: list[Tensor]) -> None:
        if ranks.owns(len(keys)):
            own.append(_profile(torch.cat(values)))
        keys.append((layer, name))

    for layer, block in enumerate(adapter.blocks):
        with adapter.open(layer):
            routed: dict[str, list[Tensor]] = {}
            for site, activations in stream.walk(block):
                if not adapter.shows(layer, site):
                    continue
                encode = block.get_submodule(site.linears[0]).site.encode
                encoded = (encode(x).float().flatten() for x in activations)
                values = list(ranks.in_turn(encoded))
                if site.expert is None:
                    profile(layer, site.activation, values)
                else:  # of all experts together
                    routed.setdefault(site.activation, []).extend(values)
            for name, values in routed.items():
                profile(layer, name, values)
    return dict(zip(keys, ranks.merged(own)))


def outliers(before: dict[tuple[int, str], dict], after: dict[tuple[int, str], dict]) -> dict:
    """The profiles of a model before and after its transform, side by side.

    {"edges" [65] of |x|, "sites" {site: {"before", "after": counts [64] over all layers}},
    "rows": [one a layer and site]}
    """
    sides = {"before": before, "after": after}
    sites: dict[str, dict] = {site: {} for _, site in before}
    for site, histograms in sites.items():
        for side, profiles in sides.items():
            counts = [one["counts"] for (_, name), one in profiles.items() if name == site]
            histograms[side] = [sum(bins) for bins in zip(*counts)]
    rows = []
    for layer, site in before:
        row: dict = {"layer": layer, "site": site}
        for side, profiles in sides.items():
            profile = profiles[layer, site]
            row[side] = {name: value for name, value in profile.items() if name != "counts"}
        rows.append(row)
    return {"edges": (2**EDGES).tolist(), "sites": sites, "rows": rows}


def _profile(x: Tensor) -> dict:
    """The profile of values x [n], float32, overwritten."""
    fourth = x - x.mean()
    variance = fourth.square_().mean()
    kurtosis = float(fourth.square_().mean() / variance.square().clamp_min(1e-30))
    size = x.abs_()
    largest = float(size.max())
    stride = len(size) // MEDIAN_OF | 1  # odd, so that all features are visited in any order
    median = float(size[::stride].median())
    # in place, for a site's values are many: half octaves from the first edge on, ends clamped
    bins = size.log2_().sub_(EDGES[0]).mul_(2).floor_().clamp_(0, len(EDGES) - 2).nan_to_num_(0)
    counts = torch.bincount(bins.long(), minlength=len(EDGES) - 1)
    return {
        "max_over_median": largest / max(median, 1e-12),
        "kurtosis": kurtosis,
        "counts": counts.tolist(),
    }
