"""What one process finds, and each of several, part by part: the same functions, given their
ranks."""

import os
from pathlib import Path

import torch
import zoo

from harness.calibration.outliers import profiles
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.calibration.subject import StreamedModel
from harness.calibration.windows import bos_gain
from harness.evaluation.divergence import Reference
from harness.evaluation.perplexity import window_losses
from harness.formats import NVFP4
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.parallel import Ranks
from harness.parallel.gradients import add_gradients
from harness.quantize.spread import spread
from harness.solvers import GPTQ, Problem
from harness.transforms.loop import Course, descend
from harness.transforms.sampling import Covariance, Reservoir

IDS = torch.randint(256, (5, 48), generator=torch.Generator().manual_seed(0))


def collectives(ranks: Ranks) -> dict:
    """Of seven items on two ranks, one has more than the other."""
    total = torch.full((3,), float(ranks.rank + 1))
    greatest = total.clone()
    strided = torch.arange(6.0).view(2, 3).T * (ranks.rank + 1)
    ranks.sum_(total, strided)
    ranks.maximum_(greatest)
    items = ranks.share(list(range(7)))
    in_turn = ranks.in_turn(torch.full((1, item), float(item)) for item in items)
    try:
        ranks.lead(lambda: [][0])
        raised = ""
    except IndexError as error:
        raised = str(error)
    return {
        "sum": total.tolist(),
        "strided": strided.tolist(),
        "maximum": greatest.tolist(),
        "share": items,
        "owned": [item for item in range(7) if ranks.owns(item)],
        "merged": ranks.merged(items),
        "starts": ranks.starts(items),
        "in turn": [tensor.tolist() for tensor in in_turn],
        "lead": ranks.lead(lambda: os.getpid()),
        "raised": raised,
    }


def tiny() -> Adapter:
    model, _ = Tiny().load()
    adapter = Adapter(model.requires_grad_(False))
    swap(adapter)
    return adapter


def mixture() -> Adapter:
    """Routed experts, of which a share of the text leaves some without a token."""
    adapter = Adapter(zoo.make("mixtral").requires_grad_(False))
    swap(adapter)
    return adapter


@torch.no_grad()
def statistics(ranks: Ranks, adapter: Adapter, enough: int | None = 0) -> dict:
    """Of every site of the first block."""
    found = {}
    stream = Stream(adapter, IDS, tokens_at_once=48, enough=enough, ranks=ranks)
    for site, arriving in stream.walk(adapter.blocks[0]):
        width = adapter.width(site, 0)
        gathered = Statistics(width, stream.tokens, "cpu", width, ranks)
        rows = 0
        for x, start in zip(arriving, arriving.starts, strict=True):
            gathered.add(x, untouched=1.5 * x, start=start)
            rows += x.flatten(0, -2).shape[0]
        if gathered.drift is None:
            gathered.compares()
        gathered.finish()
        found[site.name] = {
            "hessian": gathered.hessian,
            "drift": gathered.drift,
            "range": gathered.range,
            "sample": gathered.sample,
            "reference": gathered.reference,
            "tokens": gathered.tokens,
            "routed": arriving.routed,
            "rows": rows,
        }
    return found


def evaluation(ranks: Ranks) -> dict:
    """Losses of three windows, and the divergence from a model with other weights."""
    adapter = tiny()
    reference = Reference(adapter)
    own = reference.recorder("text")
    losses = window_losses(adapter, IDS[:3], watch=own, ranks=ranks)
    streamed = window_losses(adapter, IDS[:3], streaming=True, ranks=ranks)
    folder = Path(ranks.lead(lambda: os.environ["RANKS_FOLDER"]))
    path = folder / f"hidden.{ranks.count}.safetensors"
    reference.save(path, ranks)
    with torch.no_grad():
        adapter.head.weight.mul_(1.25)
    compared = reference.compare("text", path, IDS.shape[1], ranks)
    window_losses(adapter, IDS[:3], watch=compared, ranks=ranks)
    return {"losses": losses, "streamed": streamed, **compared.figures}


def observed(ranks: Ranks) -> dict:
    """What collectors that know nothing of ranks find."""
    model = StreamedModel(tiny(), IDS, ranks=ranks)
    sites = ("attn_in", "down_in", "head")
    covariances = model.observe(lambda _, __, width: Covariance(width, True), sites, "")
    samples = model.observe(lambda *key: Reservoir(20, *key), sites, "")
    return {
        "covariances": {str(key): value for key, value in covariances.items()},
        "samples": {str(key): value for key, value in samples.items()},
        "windows": [sorted(block.inputs) for block in model.blocks()],
    }


def looks(ranks: Ranks) -> dict:
    """What is seen of a model and its text before anything is done to it."""
    adapter = tiny()
    seen = {}
    for name, each in (("tiny", adapter), ("mixture", mixture())):
        seen[name] = {str(key): profile for key, profile in profiles(each, IDS, ranks).items()}
    return {"profiles": seen, "gain": bos_gain(adapter.model, IDS[0], 0, ranks)}


class Point:
    """A point in the plane that moves down its gradient."""

    def __init__(self):
        self.x = torch.tensor([3.0, -1.0], requires_grad=True)
        self.rest = torch.zeros(2, requires_grad=True)  # which nothing moves

    def step(self) -> None:
        with torch.no_grad():
            if self.x.grad is not None:
                self.x -= 0.05 * self.x.grad
        self.x.grad = None

    def snapshot(self) -> dict:
        return {"x": self.x.detach().clone()}

    def leaves(self) -> list:
        return [self.x, self.rest]


def learned(ranks: Ranks) -> dict:
    """Batches of three windows of nine, of which a rank has one or two."""
    text = StreamedModel(tiny(), torch.arange(10.0)[:, None], ranks=ranks)
    moving = Point()

    def loss(ids: torch.Tensor, again: bool) -> torch.Tensor:
        return ((moving.x - ids[0, 0]) ** 2).sum()

    best = descend(text, moving, loss, Course(6, 3, "test", "test", ""))
    moving.x.grad = torch.ones(2) if ranks.first else None
    add_gradients(moving.leaves(), ranks)
    return {
        "x": best.values["x"],
        "losses": [best.first, best.loss, *best.train],
        "gradient": moving.x.grad,
        "untouched": moving.rest.grad is None,
    }


def problem() -> Problem:
    """Three linears with a shared global scale and a feature that is always 0, where one of them
    has its greatest weight."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=random)
    x[:, 5] = 0
    sizes = {"q": 48, "k": 16, "v": 16}
    weights = {name: torch.randn(rows, 64, generator=random) for name, rows in sizes.items()}
    weights["k"][3, 5] = 40
    weights["v"][2, 7] = 9
    formats = dict.fromkeys(weights, NVFP4(role="weight"))
    return Problem(weights, formats, 2 / 256 * x.T @ x)


def solved(ranks: Ranks) -> dict:
    solutions = spread(GPTQ(), [{"attn_in": problem()}], ranks)
    solution = solutions["attn_in"]
    return {
        "names": list(solution.qtensors),
        "weights": {name: q.dequantize() for name, q in solution.qtensors.items()},
        "globals": [q.scales.global_scale for q in solution.qtensors.values()],
        "report": solution.report,
    }
