"""Runs as the store keeps them, for the report page, and what the page embeds of them."""

import json
import random
from pathlib import Path

HOSTILE = (
    "Traceback\n  line 3\nValueError: </script><img src=x onerror=\"document.title='owned'\"> & <b>"
)
MARKS = {
    "wikitext-2": ["same corpus as calibration", "first 8 of 145 windows"],
    "arc_easy": ["first 200 documents"],
}
BITS = {"nvfp4": 4.5, "int4": 4.25, "mxfp4": 4.25, "fouroversix": 4.5, "int8": 8.25, "mxfp6": 6.25}
GAIN = {
    "identity": 1.0,
    "hadamard": 0.8,
    "quarot": 0.7,
    "rht": 0.75,
    "dst": 0.9,
    "kronecker": 0.6,
    "smoothquant": 1.1,
}
EDGES = [2.0 ** (i / 2 - 20) for i in range(65)]


def put(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def store_run(root: Path, index: int, status: str = "done", error: str | None = None) -> str:
    """A run as the store keeps it; the same index gives the same figures. Returns its id."""
    draw = random.Random(index)
    form, transform, solver = (
        draw.choice(list(BITS)),
        draw.choice(list(GAIN)),
        draw.choice(["rtn", "gptq"]),
    )
    run_id = f"smollm2_135m-{form}-{transform}-{solver}-{index:010x}"
    run = root / run_id
    started = f"2026-01-{1 + index // 1440:02d}T{index // 60 % 24:02d}:{index % 60:02d}:00+0000"
    put(
        run / "status.json",
        {
            "status": status,
            "started": started,
            "updated": started,
            "stage": "quantized",
            "error": error,
        },
    )
    put(
        run / "config.yaml",
        f"""
seed: {index % 3}
run_root: {root}
model: {{name: smollm2_135m, hf_token: hidden}}
format:
  name: {form}
  weight: {{bits: {int(BITS[form])}, clip: [0.5, 1]}}
transform: {{name: {transform}}}
solver: {{name: {solver}}}
""",
    )
    if status == "failed":
        return run_id
    worse = (
        14
        * GAIN[transform]
        * 2 ** (4.25 - BITS[form])
        * (0.4 if solver == "gptq" else 1)
        * draw.uniform(0.8, 1.2)
    )
    kl = worse / 25
    put(
        run / "metrics.json",
        {
            "run_id": run_id,
            "status": status,
            "command": f"python run.py format={form} transform={transform} solver={solver}",
            "choices": {
                "model": "smollm2_135m",
                "data": "text",
                "format": form,
                "transform": transform,
                "solver": solver,
            },
            "stages": {
                "baseline": {"ppl": {"wikitext-2": 22.75, "pydoc": 14.12}},
                "quantized": {
                    "ppl": {"wikitext-2": 22.75 + worse, "pydoc": 14.12 + worse / 2},
                    "divergence": {"wikitext-2": {"kl": kl, "top1": 1 - kl / 2}},
                    "zeroshot": {
                        "arc_easy": {
                            "acc": 0.5,
                            "acc_norm": 0.44 - kl / 8,
                            "acc_norm_stderr": 0.035,
                            "n": 200,
                        }
                    },
                },
            },
            "bits_per_weight": BITS[form] + draw.uniform(0, 0.1),
            "seconds": {"load": 3.0, "quantized": draw.uniform(20, 90)},
            "peak_memory_mb": draw.uniform(900, 1500),
            "marks": MARKS,
            "layers": [{"name": "layer that is not embedded"}],
        },
    )
    noise = [worse * (1 + i) * draw.uniform(0.8, 1) / 1e3 for i in range(30)]
    points = [
        {"step": i, "block/rel_error": noise[i], "block/sqnr_db": 20 - i / 4} for i in range(30)
    ]
    put(
        run / "tracking" / "curves.jsonl",
        "".join(json.dumps(point) + "\n" for point in points) + '{"step": 30, "blo',
    )
    spread = 1 if transform == "identity" else 3
    sites = {}
    for n, site in enumerate(("attn_in", "o_in", "mlp_in", "down_in")):
        counts = [
            [int(1e6 * 2 ** (-((abs(i - 38) / 3) ** 1.5) / s)) for i in range(64)]
            for s in (3.0 + n, (3.0 + n) / spread)
        ]
        sites[site] = {"before": counts[0], "after": counts[1]}
    worst = [
        {
            "layer": i,
            "site": site,
            "before": {"max_over_median": 300.0 + i, "kurtosis": 88.0 - i},
            "after": {"max_over_median": 12.0 + i, "kurtosis": 4.0},
        }
        for i in range(30)
        for site in sites
    ]
    put(run / "outliers.json", {"edges": EDGES, "sites": sites, "rows": worst})
    return run_id


def embedded(page: Path) -> dict:
    """The data a browser would parse: up to the first end tag."""
    return json.loads(
        page.read_text("utf-8")
        .split('<script id="data" type="application/json">')[1]
        .split("</script>")[0]
    )


def settings(data: dict, run: dict) -> dict[str, str]:
    return dict(data["settings"][i] for i in {*data["base"]} ^ {*run["config"]})


def sweep(
    root: Path, count: int = 3, model: str = "zephyr", blocks: int = 30, extra: str = ""
) -> list[str]:
    """Runs of one model, format, transform and solver that only their group size tells apart, with
    a quantized head."""
    ids = []
    for index in range(count):
        run_id = f"{model}-int4-identity-rtn-{model}{index:04d}"
        run, size = root / run_id, 16 * 2**index
        begun = f"2026-02-01T00:{index:02d}:00+0000"
        put(run / "status.json", {"status": "done", "started": begun, "updated": begun})
        put(
            run / "config.yaml",
            f"""
seed: 0
run_root: {root}
model: {{name: {model}}}
format: {{name: int4, weight: {{bits: 4, group_size: {size}}}}}
tracking: {{name: {index}}}
api_key: {index}
{extra}""",
        )
        put(
            run / "metrics.json",
            {
                "status": "done",
                "command": "python run.py",
                "bits_per_weight": 4 + 16 / size,
                "choices": dict(zip(("model", "format", "transform", "solver"), run_id.split("-"))),
                "stages": {"quantized": {"ppl": {"pydoc": 30.0 + index}}},
            },
        )
        points = [{"step": i, "block/rel_error": 0.01 + i / 1e3} for i in range(blocks)]
        points += [
            {"step": 0, "outside/lm_head/rel_error": 0.05, "outside/embed_tokens/rel_error": 0.002}
        ]
        points += [{"step": i, "learn/loss": 1 / i} for i in range(1, 1002)]
        put(
            run / "tracking" / "curves.jsonl", "".join(json.dumps(point) + "\n" for point in points)
        )
        ids.append(run_id)
    return ids
