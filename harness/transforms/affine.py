"""Learning invertible matrices and clips (affine_sites.py), as flatquant and block_affine do.

    y = Q_a(x E) Q_w(W D^T)^T,   D = E^-1                at every site, all of which learn at once

    block   min  |block^(x) - block(x)|^2 / |block(x) - x|^2     one block after the other
    kd      min  KL(p || p^)                                     all blocks, through the whole model

over the matrices of all sites and, of integer formats, a ratio c in (0, 1] of the range of each
site's activation and of each weight. x is the untouched stream, block^ the block with activations
and weights quantized, W D^T rounded to nearest. Rounding passes gradients straight, and scales pass
theirs (models/ranged.py): without these the gradient of E would be that of its rounding errors
alone. AdamW whose rate falls to 0 by a cosine; the best iterate by the held-out windows is kept,
the start included, so that no block ends worse than it began.

The float model stays: E D = I by construction (linalg/invertible.py). Ratios go into the formats
(`Placement.clips`), so that whatever solver comes next works on the ranges that were learned.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from harness.codecs.placement import Placement, Role, Where
from harness.config.checks import boolean, integer, number, one_of
from harness.config.errors import ConfigError
from harness.formats import Integer, Scheme
from harness.transforms import loop
from harness.transforms.affine_sites import Matrices, Moving, Site, placed
from harness.transforms.base import ModelShape, Transform
from harness.transforms.calibration_model import CalibrationModel, FloatBlock
from harness.transforms.learn import Teacher, placed_loss

SEEN = ("act", "weight")
TINY = torch.finfo(torch.float32).tiny


class _BlockText:
    """The windows of one block as a text to learn from; before: steps of the blocks before it."""

    def __init__(self, block: FloatBlock, model: CalibrationModel, before: int):
        self.train = block.train
        self.held = block.held
        self.held_from = model.held_from
        self.ranks = model.ranks
        self.index = block.index
        self.model = model
        self.before = before

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        return self.model.stage(f"block {self.index}: {title}", total)

    def log(self, values: dict, step: int) -> None:
        self.model.log(values, self.before + step)


class Affine(Transform):
    """objective: block | kd. steps: of a block, or of the whole model. batch: calibration windows a
    step. lr: of all parameters. clip: learn ratios of ranges, where formats are integers."""

    learned = True
    sees = SEEN

    def __init__(self, objective: str, steps: int, batch: int, lr: float, clip: bool):
        self.objective = one_of("transform.objective", objective, ("block", "kd"))
        integer("transform.steps", steps, low=0)
        integer("transform.batch", batch)
        self.steps = steps
        self.batch = batch
        self.lr = number("transform.lr", lr, 0, 1)
        self.clip = boolean("transform.clip", clip)

    @property
    def whole(self) -> bool:
        return self.objective == "kd"

    @abstractmethod
    def begin(
        self, shape: ModelShape, model: CalibrationModel, readers: Mapping[Where, Sequence[Role]]
    ) -> Iterator[tuple[Where, Matrices]]:
        """The matrices of every site to begin with; readers: of each site, its linears."""

    def leaves(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(f"a matrix at {site}" for site in self.encodes(shape))

    def encodes(self, shape: ModelShape) -> tuple[str, ...]:
        return tuple(shape.widths)

    def check(self, shape: ModelShape) -> list[str]:
        if not (shape.scheme.any("act") or shape.scheme.any("weight")):
            raise ConfigError(
                f"format.act.bits=16 and format.weight.bits=16 with transform={self.name}: nothing "
                "is quantized, so there is nothing to learn; set format=int4, nvfp4 or mxfp4, or "
                "use transform=hadamard."
            )
        return []

    def fit(self, shape: ModelShape, model: CalibrationModel) -> Placement:
        """Raises FloatingPointError when the loss is not finite."""
        readers = _readers(shape, model)
        sites = [
            Site(where, matrices, self._clips(shape, readers[where])).to(model.device)
            for where, matrices in self.begin(shape, model, readers)
        ]
        learn = self._end_to_end if self.objective == "kd" else self._by_block
        best = learn(model, shape.scheme.seen(*SEEN), sites)
        # exact to float64, as is what they are folded into
        learned = [copy.deepcopy(site).double().cpu() for site in sites]
        notes = {
            "objective": self.objective,
            "steps": self.steps,
            "held_out_loss": [
                sum(each.first for each in best) / len(best),
                sum(each.loss for each in best) / len(best),
            ],
            "best_step": [each.step for each in best],
            "condition": max(site.matrices.condition() for site in learned),
        }
        with torch.no_grad():
            return placed(learned, notes, final=True)

    def _clips(self, shape: ModelShape, readers: Sequence[Role]) -> dict[str, list[str]]:
        """{linear: the parts whose ranges are learned} of a site, where there are any."""
        parts = {
            role.name: [
                part
                for part in SEEN
                if isinstance(shape.scheme.part(part, role.layer, role.name), Integer)
            ]
            for role in readers
        }
        return parts if self.clip and any(parts.values()) else {}

    def _by_block(
        self, model: CalibrationModel, scheme: Scheme, sites: Sequence[Site]
    ) -> list[loop.Best]:
        """Learn block by block; the sites are left at their best."""
        found = []
        for block in model.blocks():
            own = [site for site in sites if site.where[0] == block.index]
            text = _BlockText(block, model, block.index * self.steps)

            def loss(window: Tensor, again: bool, block=block, own=own) -> Tensor:
                return block_error(model, scheme, block, placed(own), int(window))

            found.append(self._descend(text, own, loss))
        return found

    def _end_to_end(
        self, model: CalibrationModel, scheme: Scheme, sites: Sequence[Site]
    ) -> list[loop.Best]:
        """Learn through the whole model; the sites are left at their best."""
        teacher = Teacher(model)

        def loss(ids: Tensor, again: bool) -> Tensor:
            return placed_loss(model, scheme, placed(sites), teacher, ids, again, stored=True)

        return [self._descend(model, sites, loss)]

    def _descend(self, text: loop.Text, sites: Sequence[Site], loss: loop.Loss) -> loop.Best:
        moving = Moving(sites, self.lr, self.steps)
        advice = f"lower transform.lr={self.lr}"
        course = loop.Course(self.steps, self.batch, self.objective, "learn", advice)
        with torch.enable_grad():
            best = loop.descend(text, moving, loss, course)
        moving.modules.load_state_dict(best.values)
        return best


def block_error(
    model: CalibrationModel, scheme: Scheme, block: FloatBlock, placement: Placement, window: int
) -> Tensor:
    """|block^(x) - block(x)|^2 / |block(x) - x|^2 of one window, a scalar."""
    target = block.targets[window].float()
    added = target - block.inputs[window].float()
    with model.unmerged(placement, scheme, stored=True, layer=block.index):
        output = block.forward(window).float()
    return (output - target).square().sum() / added.square().sum().clamp_min(TINY)


def _readers(shape: ModelShape, model: CalibrationModel) -> dict[Where, list[Role]]:
    """{(block, site): the linears that read what is encoded there}."""
    readers: dict[Where, list[Role]] = {}
    for role in model.roles.values():
        if role.swapped and role.layer is not None and role.reads is not None:
            readers.setdefault((role.layer, role.reads), []).append(role)
    return readers
