"""SignRound: what it learns is what is stored, it never does worse than RTN on its text, and it is repeatable."""

from __future__ import annotations

import logging

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.initializers import GPTQ, RTN, SignRound
from kdqat.initializers.rounding_learner import RoundingLearner
from kdqat.models import ModelSource
from kdqat.quant import LSQ, Fixed
from kdqat.student import prepare_student
from tests.initializers.error import hidden_error
from tests.quant.specs import NESTED_GRIDS, SOME_GRIDS, make_spec, spec_id

TEXT = Calibration("kdqat:prose", seq_len=32, num_rows=4, batch_size=2)
EVERY_GRID = SOME_GRIDS + NESTED_GRIDS


def prepared(initializer, kind: str = "llama", scheme: str = "W3A16_ASYM_G32", quantizer=Fixed):
    return prepare_student(ModelSource(f"toy:{kind}"), Uniform(scheme), quantizer, initializer, calibration=TEXT)


def learner_of(spec) -> RoundingLearner:
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    return RoundingLearner(Fixed(spec, weight.shape), weight)


@pytest.mark.parametrize("spec", EVERY_GRID, ids=spec_id)
def test_untouched_it_is_rtn_and_its_values_stay_on_the_grid(spec):
    learner, weight = learner_of(spec), torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(learner(weight), learner.quantizer(weight))
        learner.offset.uniform_(-0.5, 0.5)
        learner.shares.uniform_(0.6, 1.0)
        qparams = learner.qparams()
        values = learner(weight)
        learner.quantizer.load_qparams(qparams, learner.quantizer.second_level(weight))
        torch.testing.assert_close(learner.quantizer(values), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in EVERY_GRID if not s.hadamard], ids=spec_id)
def test_an_offset_of_half_moves_inner_weights_by_one_level_at_most(spec):
    learner = learner_of(spec)
    with torch.no_grad():
        start = learner.values(learner.qparams())
        learner.offset.fill_(0.5)
        up = learner.values(learner.qparams())
        learner.offset.fill_(-0.5)
        down = learner.values(learner.qparams())
    signed = learner.qparams().scale.sign()
    assert ((up - start) * signed >= -1e-6).all() and ((start - down) * signed >= -1e-6).all()
    changed = ((up != start) | (down != start)).float().mean()
    assert changed > 0.4  # nearly every weight within the range can go one way or the other


def test_gradients_are_those_of_the_straight_through_estimator():
    learner = learner_of(make_spec(4, "channel", symmetric=False))
    qparams = learner.qparams()
    learner.values(qparams).sum().backward()
    assert (
        torch.equal(learner.offset.grad.unique(), qparams.scale.detach().unique()) or (learner.offset.grad == 0).any()
    )
    assert (learner.shares.grad != 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_model_is_nearer_to_its_source_than_rtns(kind):
    rtn, learned = prepared(RTN(), kind), prepared(SignRound(num_steps=40), kind)
    assert hidden_error(learned, TEXT) < 0.6 * hidden_error(rtn, TEXT)


def test_no_learning_leaves_rtns_codes():
    """A rate that moves nothing: the start is kept."""
    rtn, learned = prepared(RTN()), prepared(SignRound(num_steps=2, lr=1e-9))
    for name, layer in rtn.layers.items():
        codes = learned.layers[name].weight_fake_quantizer.codes(learned.layers[name].weight)
        assert torch.equal(codes, layer.weight_fake_quantizer.codes(layer.weight))


@pytest.mark.parametrize(("at_the_end", "kept"), [([3.0, 3.0], "start"), ([1.0, 3.0], "last"), ([3.0, 1.0], "best")])
def test_the_state_with_the_least_error_on_all_the_text_is_kept(at_the_end, kept, monkeypatch):
    """Losses by script: two micro-batches at the start, three steps, then all text for the last and the best state."""
    learner, states = learner_of(make_spec(4)), {}
    losses = iter([1.0, 1.0, 0.9, 0.5, 0.8, at_the_end[0], 0.0, at_the_end[1], 0.0])

    def loss(self, call, i, target):
        states.setdefault(len(states), learner.offset.detach().clone())
        return learner.values(learner.qparams()).sum() * 0 + learner.offset.sum() * 1e-9 + next(losses)

    monkeypatch.setattr(SignRound, "_loss", loss)
    with torch.no_grad():
        SignRound(num_steps=3, lr=0.1)._learn({"layer": learner}, None, [torch.zeros(1)] * 2)
    number = {"start": 0, "best": 3, "last": 5}[kept]  # calls of the loss: 0 1 start, 2 3 4 steps, 5 6 last, 7 8 best
    assert torch.equal(learner.offset, states[number])


def test_a_rate_that_ruins_everything_falls_back_to_rtn():
    rtn, learned = prepared(RTN()), prepared(SignRound(num_steps=3, lr=10.0))
    assert hidden_error(learned, TEXT) <= 1.01 * hidden_error(rtn, TEXT)


@pytest.mark.parametrize("scheme", ["W3A16_G32", "W2A16_ASYM_G32", "NVFP4_A16", "NF4", "QUEST_W4A16"])
def test_the_stored_latent_weight_is_what_its_codes_mean(scheme):
    student = prepared(SignRound(num_steps=5), scheme=scheme)
    for layer in student.layers.values():
        assert type(layer.weight_fake_quantizer) is Fixed  # the stand-ins are gone
        latent = layer.weight.detach()
        torch.testing.assert_close(layer.weight_fake_quantizer(latent), latent, rtol=1e-4, atol=1e-5)


def test_it_is_repeatable_and_the_seed_counts():
    first, again, other = (prepared(SignRound(num_steps=10, seed=seed)) for seed in (0, 0, 1))
    weights = [[layer.weight for layer in student.layers.values()] for student in (first, again, other)]
    assert all(map(torch.equal, weights[0], weights[1])) and not all(map(torch.equal, weights[0], weights[2]))


def test_targets_are_those_of_the_full_precision_model_and_not_of_the_quantized_stream():
    initializer, seen = SignRound(num_steps=1), {}
    original = SignRound._learn

    def spy(self, learners, call, targets):
        seen[call.index] = torch.cat([target.clone() for target in targets])
        original(self, learners, call, targets)

    initializer._learn = spy.__get__(initializer)
    student = prepared(initializer, scheme="W2A16_G32")
    model = student.source.load_model().eval()
    ids = torch.cat([batch.input_ids for batch in TEXT.batches(student.tokenizer)])
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[0], hidden[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.model.norm(seen[1]), hidden[2], rtol=1e-4, atol=1e-4)


def test_parameters_ask_for_gradients_as_before_and_hold_none():
    student = prepared(SignRound(num_steps=2), quantizer=LSQ)
    assert all(p.requires_grad and p.grad is None for p in student.model.parameters())


def test_what_lies_outside_the_blocks_rounds_to_nearest_and_it_is_said(caplog):
    plan = Uniform("W4A16_G32", ignore=[], embeddings="W4A16_G32")
    with caplog.at_level(logging.WARNING):
        prepare_student(ModelSource("toy:llama"), plan, Fixed, SignRound(num_steps=1), calibration=TEXT)
    assert "SignRound rounds layer lm_head to nearest (RTN)" in caplog.text


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"lr": 0.0}])
def test_numbers_that_make_no_descent_are_refused(bad):
    with pytest.raises(ValueError, match="SignRound needs"):
        SignRound(**bad)


def test_gptq_and_sign_round_need_text():
    for initializer in (GPTQ(), SignRound()):
        with pytest.raises(ValueError, match=r"model\.calibration is missing"):
            prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G32"), Fixed, initializer)
