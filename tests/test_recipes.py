"""Recipes: what one word composes, and that each runs on the formats it is measured on."""

import pytest
from composed import NEAR, ROOT, divergence, done, small

from harness.config.build import settings
from harness.pipeline.build import components
from harness.pipeline.plan import make_plan

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))
FORMATS = {
    "nvfp4": [],
    "mxfp4": [],
    "int4": ["format.weight.group_size=32"],
    "w4a16": ["format.weight.group_size=32"],
}
SPELLED = {
    "rtn": ["solver=rtn"],
    "gptq": ["solver=gptq", "solver.order=activation", "format.weight.observer=mse"],
    "hessian": ["solver=rtn", "format.weight.observer=hessian", "solver.refit=true"],
    "propagated": [
        "solver=gptq",
        "solver.order=activation",
        "solver.stream=both",
        "solver.propagate=qep",
        "format.weight.observer=hessian",
    ],
}
SPELLED["wush"] = [*SPELLED["propagated"], "transform=wush"]
SPELLED["best"] = SPELLED["wush"]
SPELLED["distilled"] = [*SPELLED["wush"], "tune=scales"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_run_that_its_settings_spell(tmp_path, recipe):
    """Stored results of one are found by the other."""
    one, other = (
        make_plan(settings(cfg), choices)
        for cfg, choices in (small(tmp_path, f"recipe={recipe}"), small(tmp_path, *SPELLED[recipe]))
    )
    assert one.run_id == other.run_id


def test_the_hessian_is_of_what_will_be_read(tmp_path):
    """Where the stream goes on with quantized activations, and there are any."""
    ways = {
        ("nvfp4", "solver.stream=both"): "quantized",
        ("nvfp4", "solver.stream=weights"): "fp",
        ("nvfp4a16", "solver.stream=both"): "fp",
    }
    for (format, stream), wanted in ways.items():
        cfg, choices = small(tmp_path, f"format={format}", "solver=gptq", stream)
        parts = components(make_plan(settings(cfg), choices))
        assert parts.solver.hessian_input == wanted


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run(tmp_path, recipe, format):
    less = ["tune.steps=2", "tune.windows=8"] if recipe == "distilled" else []
    outcome = done(tmp_path, f"recipe={recipe}", f"format={format}", *FORMATS[format], *less)
    assert 0 < divergence(outcome.metrics) < NEAR
