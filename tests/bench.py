"""Speed and memory as ratios measured in one run: `make bench`.

One part alone: `make bench ARGS=evaluation`. Parts: evaluation (NVFP4 W4A4 forward against the
float32 forward of the same windows, pair by pair), gptq (CPU seconds of each part of quantizing
against what that part cannot do without, measured beside it), memory (peak resident memory of
quantizing against the parts it has to hold), large and mixture (the same for a model whose blocks
stay on disk, dense and of experts), experts (a layer's experts solved at once against one by one),
learning (a step of a transform that learns end to end against a plain forward and backward
with weight gradients), adascale (an iteration against training the block's own weights), online
(what the parts that stay online add to the NVFP4 forward), gpu (blocks of an 8 B model on a GPU,
where there is one). Nothing else should run on the machine.
"""

import argparse

from bench_disk import large, mixture
from bench_experts import experts
from bench_forward import evaluation, learning, online
from bench_gpu import gpu
from bench_solvers import adascale, gptq, memory

PARTS = {
    "evaluation": evaluation,
    "gptq": gptq,
    "memory": memory,
    "large": large,
    "experts": experts,
    "mixture": mixture,
    "learning": learning,
    "adascale": adascale,
    "online": online,
    "gpu": gpu,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"any of {', '.join(PARTS)}")
    for part in parser.parse_args().parts:
        PARTS[part]()
