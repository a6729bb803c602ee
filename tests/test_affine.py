"""Learned affine transforms on a model and in a run: logits stay, and what is learned from is what
will be stored."""

import copy
import json
from pathlib import Path

import pytest
import torch
import zoo
from affine_parts import F64, INT4, NV, TOKEN, close, wander
from composed import done
from preserved import exact_model, logits, tiny_shape, token_ids

from harness.calibration.subject import StreamedModel
from harness.checkpoints.record import Record
from harness.codecs.placement import Placement
from harness.config.errors import ConfigError
from harness.formats import Integer, Scheme
from harness.models.adapter import Adapter, shape_of
from harness.models.merge import place, swap
from harness.transforms.affine import block_error
from harness.transforms.affine_sites import Moving, Site, placed
from harness.transforms.block_affine import BlockAffine
from harness.transforms.flatquant import FlatQuant, Pair
from harness.transforms.wush import Wush

IDS, WINDOWS = token_ids(), token_ids(6, 32, seed=2)
WAYS = {
    "flatquant": (FlatQuant, INT4, {"lr": 0.01}),
    "block_affine": (BlockAffine, NV, {"lr": 0.02, "init": "identity"}),
}


def fitted(adapter, way, scheme=None, windows=WINDOWS, objective="block", steps=2, **more):
    transform, default, settings = WAYS[way]
    scheme = scheme or default
    learned = transform(objective, steps, 1, **{**settings, **more})
    shape = shape_of(adapter.structure, scheme)
    learned.check(shape)
    return learned.fit(shape, StreamedModel(adapter, windows))


def swapped(family="llama"):
    """A tiny model with a channel of outliers in every group of what its norms write."""
    adapter = exact_model(family)
    adapter.model.requires_grad_(False)
    for name, role in adapter.roles.items():
        if role.kind == "norm" and role.layer is not None:
            adapter.model.get_submodule(name).weight[::16] *= 8
    swap(adapter)
    return adapter


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_logits_stay(family, way):
    adapter = swapped(family)
    before = logits(adapter, IDS)
    placement = fitted(adapter, way)
    everywhere = {(layer, site) for layer in range(2) for site in adapter.structure.widths}
    assert set(placement.online) == everywhere
    assert set(placement.merged) == (everywhere if way == "flatquant" else set())
    place(adapter, placement)
    assert float((logits(adapter, IDS) - before).abs().max()) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("name, way", [
    ("mixtral", "flatquant"),
    ("falcon_h1", "flatquant"),
    ("gpt2", "flatquant"),
    ("gpt_oss", "block_affine"),
])  # fmt: skip
def test_logits_of_other_architectures_stay(name, way):
    model = zoo.make(name)
    model.requires_grad_(False)
    before = model(token_ids(2, 64), use_cache=False).logits
    adapter = Adapter(model)
    swap(adapter)
    scheme = Scheme(weight=Integer(), act=TOKEN)
    place(adapter, fitted(adapter, way, scheme, steps=1))
    after = model(token_ids(2, 64), use_cache=False).logits
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def errors(adapter, scheme, placement, windows):
    """The mean error of every block on these windows, as its linears are stored."""
    subject = StreamedModel(adapter, windows)
    scheme = scheme.clipped(placement.clips)
    bare = Placement(merged=placement.merged, online=placement.online)
    with torch.no_grad():
        return [
            sum(float(block_error(subject, scheme, block, bare, i)) for i in range(len(windows)))
            / len(windows)
            for block in subject.blocks()
        ]


@pytest.mark.parametrize(
    "way, clip", [("flatquant", True), ("flatquant", False), ("block_affine", False)]
)
def test_what_is_learned_serves_a_text_that_was_not_seen(way, clip):
    adapter = swapped()
    start, learned = (fitted(adapter, way, steps=steps, clip=clip) for steps in (0, 24))
    other = token_ids(4, 32, seed=9)
    before, after = (errors(adapter, WAYS[way][1], p, other) for p in (start, learned))
    for first, last in zip(before, after):
        assert last < 0.95 * first
    assert bool(learned.clips) == clip
    first, last = learned.notes["held_out_loss"]
    assert last < first == pytest.approx(start.notes["held_out_loss"][1])
    # the held-out tenth is the last window, and no clip is left out of the figure
    told = errors(adapter, WAYS[way][1], learned, WINDOWS[-1:])
    assert sum(told) / 2 == pytest.approx(last, rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_steps_that_make_things_worse_are_not_kept(way):
    adapter = swapped()
    start, learned = (fitted(adapter, way, steps=steps, lr=1.0) for steps in (0, 3))
    assert learned.notes["best_step"] == [0, 0]
    for where, codec in start.online.items():
        eye = torch.eye(adapter.structure.widths[where[1]], dtype=F64)
        assert torch.equal(learned.online[where].encode(eye), codec.encode(eye))
    assert not start.clips and not learned.clips


def test_learning_reads_what_will_be_stored():
    """Weights merged, clipped and rounded, activations on clipped ranges: the block as unmerged,
    and as it is once all of that has been done to it."""
    adapter = swapped()
    shape = shape_of(adapter.structure, INT4)
    subject = StreamedModel(adapter, WINDOWS)
    transform = FlatQuant("block", 1, 1, 0.01)
    readers = {}
    for role in adapter.roles.values():
        if role.layer is not None and role.kind == "linear":
            readers.setdefault((role.layer, role.reads), []).append(role)
    sites = []
    for where, matrices in transform.begin(shape, subject, readers):
        clips = {role.name: ["act", "weight"] for role in readers[where]}
        site = Site(where, wander(matrices, 0.1), clips).double()
        site.shrunk.data = torch.linspace(0.05, 0.2, len(clips) + 1, dtype=F64)
        sites.append(site)
    block = next(iter(subject.blocks()))
    inputs, targets = block.inputs[0], block.targets[0].clone()
    wanted = float(block_error(subject, INT4, block, placed(sites), 0).detach())
    assert wanted > 1e-3
    with torch.no_grad():
        final = placed(sites, final=True)
        place(adapter, final)
        scheme = INT4.clipped(final.clips)
        for name, role in adapter.roles.items():
            if role.layer == 0 and role.kind == "linear":
                linear = adapter.model.get_submodule(name)
                linear.load(scheme.part("weight", 0, role.name).fake(linear.weight))
                linear.site.format = scheme.part("act", 0, role.name)
        output = block.forward(0)
    found = (output - targets).square().sum() / (targets - inputs).square().sum()
    assert float(found) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_distillation_moves_the_matrices_of_all_blocks(way):
    adapter = swapped()
    start, learned = (
        fitted(adapter, way, objective="kd", steps=steps, lr=0.01) for steps in (0, 8)
    )
    first, last = learned.notes["held_out_loss"]
    assert last < first
    for where, codec in start.online.items():
        eye = torch.eye(adapter.structure.widths[where[1]], dtype=F64)
        assert float((learned.online[where].encode(eye) - codec.encode(eye)).abs().max()) > 1e-4
    assert bool(learned.clips) == (way == "flatquant")


def test_blocks_begin_as_wush_has_them():
    adapter = swapped()
    placement = fitted(adapter, "block_affine", init="wush", steps=0)
    shape = shape_of(adapter.structure, NV)
    for where, codec in Wush().fit(shape, StreamedModel(adapter, WINDOWS)).online.items():
        close(placement.online[where].encoder, codec.encoder, 1e-9)
        close(placement.online[where].decoder, codec.decoder, 1e-9)


def test_optimizer_and_best_iterate_hold_the_parameters_of_all_sites():
    site = Site((0, "attn_in"), Pair(torch.eye(2), torch.eye(3), 6), {"q": ["act", "weight"]})
    before = copy.deepcopy(site)
    moving = Moving([site], 0.1, 10)
    kept = moving.snapshot()
    sum(p.sum() for p in site.parameters()).backward()
    moving.step()
    for name, parameter in site.named_parameters():
        moved = parameter.detach() - dict(before.named_parameters())[name]
        # a ratio may only shrink: 1 - c stays at 0 where the step would have made it negative
        assert float(moved.abs().max()) == (0 if name == "shrunk" else pytest.approx(0.1))
        assert torch.equal(kept[name if name in kept else f"0.{name}"], before.state_dict()[name])


@pytest.mark.parametrize("transform, settings, scheme, words", [
    (FlatQuant, {}, Scheme(), r"format\.act\.bits=16 and format\.weight\.bits=16 with"),
    (FlatQuant, {"objective": "lm"}, INT4, r"transform\.objective=lm"),
    (FlatQuant, {"steps": -1}, INT4, r"transform\.steps=-1"),
    (FlatQuant, {"lr": "fast"}, INT4, r"transform\.lr=fast"),
    (FlatQuant, {"init": "wush"}, INT4, r"transform\.init=wush"),
    (FlatQuant, {"scale": 1}, INT4, r"transform\.scale=1"),
    (BlockAffine, {}, Scheme(), r"format\.act\.bits=16 and format\.weight\.bits=16 with"),
    (BlockAffine, {"block_size": 7}, NV, r"transform\.block_size=7 does not divide site attn_in"),
    (BlockAffine, {"block_size": 6}, NV, r"transform\.block_size=6: no Hadamard matrix"),
    (BlockAffine, {"damp": 0}, NV, r"transform\.damp=0"),
    (BlockAffine, {"init": "hadamard"}, NV, r"transform\.init=hadamard"),
])  # fmt: skip
def test_refusals_name_the_field(transform, settings, scheme, words):
    chosen = {"objective": "block", "steps": 1, "batch": 1, "lr": 0.01, **settings}
    with pytest.raises(ConfigError, match=f"^{words}"):
        transform(**chosen).check(tiny_shape(scheme))


def test_blocks_of_any_order_may_begin_as_identity():
    transform = BlockAffine("block", 1, 1, 0.01, init="identity", block_size=6)
    assert transform.check(tiny_shape(NV)) == [
        "transform.block_size=6 is smaller than the format's group 16"
    ]


def run(tmp_path, *overrides):
    quick = ["transform=flatquant", "transform.steps=8", "transform.lr=0.02"]
    int4 = ["format=int4", "format.weight.group_size=32"]
    return done(tmp_path, *quick, *int4, *overrides)


def test_a_run_clips_what_was_learned_and_is_loaded_back(tmp_path):
    """And another solver finds the matrices, and the ratios, in the store."""
    path = tmp_path / "kept.safetensors"
    first = run(tmp_path, "solver=rtn", f"transform.save={path}", "export=harness",
                f"export.path={tmp_path / 'o'}")  # fmt: skip
    assert first.metrics["notes"]["gate"]["max"] < 1e-4
    record = Record.read(Path(first.metrics["export"]["path"]))
    for formats in (record.activations, record.weights):
        assert any(0 < format.clip < 1 for format in formats.values())
    again = run(tmp_path, "solver=gptq")
    lines = (again.run.path / "events.jsonl").read_text().splitlines()
    (event,) = [e for e in map(json.loads, lines) if e["event"] == "placement"]
    assert event["source"] == "store"
    loaded = run(tmp_path / "b", "solver=rtn", f"transform.load={path}")
    assert loaded.metrics["stages"] == first.metrics["stages"]
