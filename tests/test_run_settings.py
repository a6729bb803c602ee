"""What tells stored runs apart: the settings that differ, as one would type them."""

from harness.report.settings import apart


def told(*runs: tuple[dict, dict]) -> list[str]:
    """What tells runs apart, from ({group: option}, {dotted key: value}) of each."""
    return apart([{"choices": choices} for choices, _ in runs], [settings for _, settings in runs])


def test_points_of_a_sweep_are_told_apart():
    int4, nvfp4 = {"format": "int4"}, {"format": "nvfp4"}
    sizes = [
        (int4, {"format.weight.group_size": size, "seed": "0"}) for size in ("32", "64", "128")
    ]
    assert told(*sizes) == [f"weight.group_size={size}" for size in (32, 64, 128)]
    assert told(*sizes, (nvfp4, {"format.weight.group_size": "16", "seed": "1"})) == [
        *(f"weight.group_size={size}" for size in (32, 64, 128)),
        "seed=1",
    ]  # an option's own settings follow from it
    assert told(*sizes[:1] * 2, *sizes[1:2]) == ["", "", "weight.group_size=64"]
    assert told(sizes[0]) == told((int4, {}), (int4, {"seed": "1"}))[:1] == [""]


def test_what_tells_runs_apart_names_what_one_would_type():
    alike = {
        "format.weight.bits": "4",
        "format.act.bits": "4",
        "transform.r1.lr": "0.1",
        "format.overrides": "null",
    }
    other = {
        "format.weight.bits": "3",
        "format.act.bits": "4",
        "transform.r1.lr": "0.2",
        "format.overrides.lm_head": "8",
    }
    assert told(({}, alike), ({}, other)) == [
        "overrides.lm_head=null weight.bits=4 r1.lr=0.1",
        "overrides.lm_head=8 weight.bits=3 r1.lr=0.2",
    ]
    same = [({}, {"a.x.lr": value, "b.x.lr": value}) for value in "12"]
    assert told(*same) == [
        "a.x.lr=1 b.x.lr=1",
        "a.x.lr=2 b.x.lr=2",
    ]  # two keys of one ending are written out
    silent = (
        {"tracking": "local"},
        {
            "run_root": "a",
            "tracking.name": "b",
            "force": "true",
            "on_error": "raise",
            "model.trust_remote_code": "false",
        },
    )
    assert told(({}, {"seed": "0"}), (silent[0], silent[1] | {"seed": "0"})) == ["", ""]
    texts = [
        ({"data": data, "eval": "perplexity"}, {"data.path": path, "seed": "0"})
        for data, path in (("text", "/a"), ("text", "/b"), ("pydoc", "null"))
    ]
    assert told(*texts) == ["data.path=/a", "data.path=/b", "data=pydoc"]
    recipes = [
        ({"recipe": recipe, "solver": "gptq"}, {"solver.order": order, "solver.damp": damp})
        for recipe, order, damp in (("a", "x", "1"), ("b", "y", "1"), ("b", "y", "2"))
    ]
    # what a recipe brings with it follows from it
    assert told(*recipes) == ["recipe=a", "solver.damp=1", "solver.damp=2"]
