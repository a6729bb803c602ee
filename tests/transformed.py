"""Small runs under each transform, with as few steps as show that it learns."""

from composed import ROOT, small

from harness.pipeline.job import execute

TRANSFORMS = sorted(path.stem for path in (ROOT / "conf" / "transform").glob("*.yaml"))
END_TO_END = {"spinquant", "spinquant_paper", "adacodec", "adacodec_paper", "learned_rotation"}
AFFINE = {"flatquant", "block_affine"}
QUICK = {name: ["transform.steps=2", "transform.batch=1"] for name in END_TO_END | AFFINE} | {
    name: ["transform.r1.epochs=1"] for name in ("dartquant", "jointquant", "jq_seed")
}
ROTATED = ["quarot", "spinquant", "dartquant", "jointquant"]


def run(tmp_path, transform, *overrides):
    cfg, choices = small(tmp_path, f"transform={transform}", *QUICK.get(transform, []), *overrides)
    return execute(cfg, choices)
