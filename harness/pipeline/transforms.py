"""The transforms of a run: the one that is chosen, and SmoothQuant beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.config.build import build
from harness.config.checks import one_of, typed
from harness.config.errors import ConfigError
from harness.transforms import Transform
from harness.transforms.smoothquant import NORM_SITES, PRODUCT_SITES, SmoothQuant


def transforms_of(section: Mapping) -> list[Transform]:
    """The transform, with SmoothQuant before or after it where `smooth` asks for that."""
    own = {
        key: value
        for key, value in section.items()
        if key not in ("name", "smooth", "save", "load")
    }
    transform = build(own, "transform", Transform)
    transform.name = section["name"]  # of the option, for a class may serve several
    smooth = section.get("smooth")
    if smooth is None:
        return [transform]
    typed("transform.smooth.", smooth, {"alpha": float, "when": str, "sites": list[str] | None})
    when = one_of("transform.smooth.when", smooth.get("when", "before"), ("before", "after"))
    if when == "after" and not transform.residual:
        raise ConfigError(
            f"transform.smooth.when=after with transform={section['name']}: only a rotated "
            "residual stream has a basis of its own to smooth in; "
            "set transform.smooth.when=before."
        )
    legal = _smoothable(when) if transform.residual else (*NORM_SITES, *PRODUCT_SITES)
    stacked = _smooth(smooth, when, legal)
    return [stacked, transform] if when == "before" else [transform, stacked]


def _smoothable(when: str) -> tuple[str, ...]:
    """Sites that take scales beside a rotated residual stream: what norms feed has its basis only
    after the rotation, what products feed is not rotated by it."""
    return PRODUCT_SITES if when == "before" else NORM_SITES


def _smooth(settings: Mapping, when: str, legal: Sequence[str]) -> SmoothQuant:
    """SmoothQuant by the settings of `transform.smooth`, at legal sites only."""
    own = {key: value for key, value in settings.items() if key != "when" and value is not None}
    target = "harness.transforms.smoothquant.SmoothQuant"
    node = {"_target_": target, "sites": list(legal), **own}
    smooth = build(node, "transform.smooth", SmoothQuant)
    for site in smooth.sites:
        if site not in legal:
            raise ConfigError(
                f"transform.smooth.sites={settings['sites']} with transform.smooth.when={when}: "
                f"under a rotated residual stream {site} cannot be smoothed then; "
                f"legal: {', '.join(legal)}."
            )
    return smooth
