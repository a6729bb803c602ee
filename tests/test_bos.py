"""Where a BOS stands in the windows of a text; `auto` asks the model whether it needs one."""

from types import SimpleNamespace

import pytest
import torch
from composed import composed, done
from torch import nn

from harness.calibration.windows import NEEDED, bos_gain, tokenize, windows, without
from harness.config.build import settings
from harness.config.errors import ConfigError, DataError
from harness.evaluation.perplexity import perplexity, window_losses
from harness.models.adapter import Adapter
from harness.models.tiny import Tiny
from harness.pipeline import computation
from harness.pipeline.plan import make_plan

BOS = 256
TEXT = torch.arange(40) % 7


class Reliant(nn.Module):
    """Knows that token t is followed by (t + 1) % 7, but only where its input begins with a BOS."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(257, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 257)
        if int(input_ids[0, 0]) == BOS:
            logits.scatter_(-1, ((input_ids + 1) % 7).unsqueeze(-1), 10.0)
        return SimpleNamespace(logits=logits)


def test_every_window_begins_with_it_and_no_token_is_lost():
    cut = windows(TEXT, 8, None, bos=BOS)
    assert cut.shape == (5, 8)
    assert (cut[:, 0] == BOS).all()
    assert torch.equal(cut[:, 1:].flatten(), TEXT[:35])


def test_one_that_the_text_has_already_is_not_repeated():
    begun = torch.cat([torch.tensor([BOS]), TEXT])
    assert torch.equal(windows(begun, 8, None, bos=BOS), windows(TEXT, 8, None, bos=BOS))
    assert torch.equal(without(begun, BOS), TEXT)
    assert torch.equal(without(TEXT, BOS), TEXT)


def test_a_text_that_is_too_short_is_refused_by_the_length_that_was_asked_for():
    with pytest.raises(DataError, match=r"of data\.calibration\.length=64 tokens need 63"):
        windows(TEXT, 64, 1, bos=BOS)


def test_random_windows_begin_with_it_too():
    cut = windows(TEXT, 8, 6, "random", seed=1, bos=BOS)
    assert torch.equal(cut[:, 1:], windows(TEXT, 7, 6, "random", seed=1))
    assert (cut[:, 0] == BOS).all()


def test_the_gain_is_the_difference_of_the_losses():
    """Uniform over 257 tokens without a BOS; with it, e^10 against 256 others."""
    ignorant = torch.tensor(257.0).log()
    certain = (1 + 256 * torch.tensor(-10.0).exp()).log()
    assert bos_gain(Reliant(), TEXT, BOS) == pytest.approx(float(ignorant - certain), rel=1e-5)


def test_a_random_model_needs_none():
    model, _ = Tiny().load()
    assert abs(bos_gain(model, TEXT, BOS)) < NEEDED


def plan(*overrides):
    cfg, choices = composed("model=tiny", "format=nvfp4", *overrides)
    return make_plan(settings(cfg), choices)


def test_what_the_model_asks_for_is_no_part_of_the_id_and_what_a_user_asks_for_is():
    ids = {bos: plan(f"data.bos={bos}").quant_id for bos in ("auto", "window", "none")}
    assert len(set(ids.values())) == 3
    assert plan().quant_id == ids["auto"]


FLOAT = ["format=none", "solver=none"]


def read(outcome):
    """Perplexity of the untouched model, on the two windows of 128 tokens that `small` has."""
    return outcome.metrics["stages"]["baseline"]["ppl"]["pydoc"]


@pytest.mark.parametrize("bos", ["window", "first", "none"])
def test_a_run_reads_it_where_it_was_asked_for(tmp_path, bos):
    """And has nothing to say of it."""
    outcome = done(tmp_path, *FLOAT, f"data.bos={bos}")
    model, tokenizer = Tiny().load()
    assert tokenizer.bos_token_id == BOS
    text = without(tokenize(tokenizer, (tmp_path / "text" / "test.txt").read_text()), BOS)
    begun = torch.cat([torch.tensor([BOS]), text])
    cut = {
        "window": torch.stack([begun[:128], torch.cat([begun[:1], text[127:254]])]),
        "first": begun[:256].view(2, 128),
        "none": text[:256].view(2, 128),
    }
    found = {
        where: perplexity(window_losses(Adapter(model), ids), 128) for where, ids in cut.items()
    }
    assert len(set(found.values())) == 3
    assert read(outcome) == pytest.approx(found[bos], rel=1e-6)
    assert "bos" not in outcome.metrics["notes"]


@pytest.mark.parametrize(("gain", "said"), [(NEEDED, False), (0.42, True)])
def test_a_run_says_that_the_model_asked_for_it(tmp_path, monkeypatch, gain, said):
    monkeypatch.setattr(computation, "bos_gain", lambda *_: gain)
    outcome = done(tmp_path, *FLOAT)
    note = outcome.metrics["notes"].get("bos")
    assert note == ("in every window, for 0.42 nats a token less" if said else None)
    window = read(done(tmp_path, *FLOAT, "data.bos=window"))
    assert (read(outcome) == window) is said


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.bos=always"):
        plan("data.bos=always")
