"""The stream of activations is the model's own forward; gathered from it are Hessians, ranges and
samples."""

import pytest
import torch
from composed import small

from harness.calibration.shipped import Pydoc
from harness.calibration.statistics import Statistics
from harness.calibration.stream import Stream
from harness.calibration.windows import tokenize, windows
from harness.formats import NVFP4, Scheme
from harness.models.adapter import Adapter
from harness.models.merge import swap
from harness.models.tiny import Tiny
from harness.pipeline.job import execute
from harness.quantize import blocks
from harness.solvers import GPTQ
from harness.store import Store


class Watching(GPTQ):
    """Keeps the Hessian of the first site it is asked to solve."""

    def solve_together(self, problems):
        self.__dict__.setdefault("first", problems[0].hessian.clone())
        return super().solve_together(problems)


@pytest.mark.parametrize(
    "act",
    [NVFP4(role="activation"), NVFP4(role="activation", scope="token")],
    ids=["tensor", "token"],
)
def test_a_calibration_text_is_quantized_without_its_neighbours(tmp_path, act):
    """H of two texts is the mean of H of each, whatever spans the scale of an activation."""
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))

    def hessian(name, windows):
        adapter, solver = Adapter(Tiny().load()[0]), Watching(hessian_input="quantized")
        swap(adapter)
        run = Store(tmp_path).run(name)
        run.start({}, {})
        blocks.quantize(
            adapter, Scheme(weight=NVFP4(), act=act), solver, windows, run, lambda *report: None
        )
        return solver.first

    both, one, other = hessian("both", ids), hessian("one", ids[:1]), hessian("other", ids[1:])
    assert (both - (one + other) / 2).abs().max() < 1e-6 * both.abs().max()


def test_static_scale_is_that_of_the_solved_model(tmp_path):
    """What each site stores is the greatest magnitude it reads once the weights are quantized, in
    both sequencings."""
    for sequencing in ("sites", "block"):
        cfg, choices = small(tmp_path, f"solver.sequencing={sequencing}", "format.act.bits=16")
        outcome = execute(cfg, choices)
        model, tokenizer = Tiny().load()
        adapter = Adapter(model)
        swap(adapter)
        text = Pydoc().text("calibration")
        cut = windows(tokenize(tokenizer, text), 64, 6)
        scheme = Scheme(weight=NVFP4())
        blocks.quantize(adapter, scheme, GPTQ(), cut, outcome.run, lambda *_: None)
        seen = {}
        for site in adapter.sites(0):
            reader = adapter.blocks[1].get_submodule(site.linears[0])

            def keep(_, args, name=site.name, seen=seen):
                return seen.update({name: args[0].abs().amax()})

            reader.register_forward_pre_hook(keep)
        with torch.no_grad():
            model(cut)
        stored, _ = outcome.run.load_block(1)
        for name, amax in seen.items():
            assert stored[f"{name}.range"].abs().max().item() == pytest.approx(
                amax.item(), rel=1e-5
            )


def test_stream_is_the_forward_of_the_model():
    """Unequal micro-batches pass the blocks as the model itself does."""
    model, _ = Tiny(family="qwen3").load()
    adapter = Adapter(model)
    ids = torch.randint(256, (5, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stream = Stream(adapter, ids, tokens_at_once=80)
        assert [len(hidden) for hidden in stream.hidden] == [2, 2, 1]
        for block in adapter.blocks:
            stream.advance(block)
        wanted = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(model.model.norm(torch.cat(stream.hidden)), wanted, atol=1e-5)


def test_a_walk_goes_through_the_sites_and_on_with_what_their_linears_become():
    """What a caller leaves unread still passes; a linear changed at its site computes what
    follows."""
    model, _ = Tiny().load()
    adapter = Adapter(model)
    ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    block, seen = adapter.blocks[0], {}
    with torch.no_grad():
        stream = Stream(adapter, ids, tokens_at_once=64)
        for site, activations in stream.walk(block):
            seen[site.name] = next(iter(activations)).clone()
            if site.name == "down_in":
                block.mlp.down_proj.weight.mul_(3)
        wanted = model(ids, output_hidden_states=True).hidden_states[1]
        block.mlp.down_proj.weight.div_(3)
        before = model(ids, output_hidden_states=True).hidden_states[1]
    assert list(seen) == [site.name for site in adapter.sites(0)]
    assert [x.shape[-1] for x in seen.values()] == [
        adapter.width(site) for site in adapter.sites(0)
    ]
    assert torch.allclose(torch.cat(stream.hidden), wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)


def test_statistics_hold_the_whole_hessian_the_range_and_every_other_row():
    x = torch.randn(700, 1000, generator=torch.Generator().manual_seed(2))
    statistics = Statistics(1000, 700, x.device, curvature=1000)
    for part in x.split(300):
        statistics.add(part)
    statistics.finish()
    assert torch.allclose(statistics.hessian, 2 / 700 * x.T @ x, atol=1e-4)
    assert statistics.range.tolist() == [x.min(), x.max()]
    assert torch.equal(statistics.sample, x[::2])
