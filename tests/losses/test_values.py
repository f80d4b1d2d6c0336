"""Each loss against golden vectors (methods/core.md, section 9), hand computations and its own errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdqat.losses import (
    CAKLD,
    TVD,
    AttentionTransfer,
    CrossEntropy,
    ForwardKL,
    GeneralizedJSD,
    HiddenStates,
    LogitLoss,
    ReverseKL,
)
from kdqat.losses.select import target_mask
from kdqat.types import Batch, Outputs
from tests.losses.toy import Model, ragged_batch, random_batch

TEACHER = torch.tensor([2.0, 1.0, 0.0, -1.0])
STUDENT = torch.tensor([1.5, 1.2, -0.5, 0.3])
GOLDEN = [  # TVD and CrossEntropy: computed by hand with math.exp
    (ForwardKL(), 0.114394),
    (ForwardKL(2.0), 0.184768),
    (ReverseKL(), 0.149245),
    (GeneralizedJSD(0.0), 0.114394),
    (GeneralizedJSD(0.1), 0.0104459),
    (GeneralizedJSD(), 0.0313237),
    (GeneralizedJSD(0.9), 0.0128050),
    (GeneralizedJSD(1.0), 0.149245),
    (CAKLD(0.643914), 0.136835),
    (CAKLD(None), 0.136835),  # one token: its own confidence is the mean
    (CAKLD(0.0), 0.114394),
    (CAKLD(1.0), 0.149245),
    (TVD(), 0.2096282),
    (CrossEntropy(), 1.0781075),
]


def from_logits(logits: torch.Tensor) -> Outputs:
    """One row of two tokens, the first of which predicts label 1; the head is the identity."""
    return Outputs(logits.expand(1, 2, -1), nn.Identity(), {})


@pytest.mark.parametrize(("loss", "value"), GOLDEN, ids=lambda x: type(x).__name__)
def test_a_loss_gives_its_golden_value(loss: LogitLoss, value: float):
    batch = Batch(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    parts = loss(from_logits(STUDENT), from_logits(TEACHER), batch)
    assert parts.sum.item() == pytest.approx(value, abs=1e-5)
    assert parts.num.item() == 1
    assert parts.by_name[loss.name].item() == pytest.approx(value, abs=1e-5)
    assert parts.by_name["kl"].item() == pytest.approx(0.114394, abs=1e-5)


def test_the_plain_kl_is_computed_once_when_it_is_the_loss(monkeypatch):
    import kdqat.losses.logits as logits

    calls = []
    monkeypatch.setattr(logits, "token_kl", lambda t, s: calls.append(1) or s[:, 0])
    batch = Batch(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    ForwardKL()(from_logits(STUDENT), from_logits(TEACHER), batch)
    assert not calls
    ForwardKL(2.0)(from_logits(STUDENT), from_logits(TEACHER), batch)
    assert len(calls) == 1


def test_cross_entropy_needs_no_teacher_and_then_logs_no_kl():
    batch = ragged_batch()
    outputs = Model(0).outputs(batch)
    parts = CrossEntropy()(outputs, None, batch)
    logits = outputs.head(outputs.hidden)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
    # the left-padded source of row 2 predicts a real label: cross_entropy counts it, we do not
    source_is_padding = F.cross_entropy(outputs.head(outputs.hidden)[2, :1], batch.labels[2, 1:2])
    torch.testing.assert_close(parts.sum, expected - source_is_padding)
    assert set(parts.by_name) == {"cross_entropy"}


def test_cakld_logs_the_confidence_that_its_constant_is_the_mean_of():
    batch = Batch(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    parts = CAKLD(0.5)(from_logits(STUDENT), from_logits(TEACHER), batch)
    assert parts.by_name["teacher_confidence"].item() == pytest.approx(0.643914, abs=1e-5)


def test_hidden_mse_is_the_mean_over_width_and_layers_summed_over_tokens():
    batch = ragged_batch()
    student, teacher = Model(0).outputs(batch), Model(1).outputs(batch)
    mask = target_mask(batch)
    pairs = list(zip(student.extras["hidden_states"], teacher.extras["hidden_states"], strict=True))
    by_hand = [((s - t)[mask] ** 2).mean(-1).sum() for s, t in pairs]
    torch.testing.assert_close(HiddenStates()(student, teacher, batch).sum, sum(by_hand) / 3)
    torch.testing.assert_close(HiddenStates(layers=[0, -1])(student, teacher, batch).sum, (by_hand[0] + by_hand[2]) / 2)
    cosine = [(1 - F.cosine_similarity(s, t, dim=-1))[mask].sum() for s, t in pairs]
    torch.testing.assert_close(HiddenStates("cosine")(student, teacher, batch).sum, sum(cosine) / 3)


def test_attention_transfer_is_the_mean_kl_over_heads_and_layers_summed_over_queries():
    batch = random_batch()
    student, teacher = Model(0).outputs(batch), Model(1).outputs(batch)
    by_hand = []
    for s, t in zip(student.extras["attentions"], teacher.extras["attentions"], strict=True):
        kl = torch.where(t > 0, t * (t / s).log(), 0.0).sum(-1)  # [B, A, T]
        by_hand.append(kl.mean(1)[:, :-1].sum())
    torch.testing.assert_close(AttentionTransfer()(student, teacher, batch).sum, sum(by_hand) / 2)
    torch.testing.assert_close(AttentionTransfer([-1])(student, teacher, batch).sum, by_hand[1])


@pytest.mark.parametrize("loss", [HiddenStates(), AttentionTransfer()])
def test_layerwise_losses_refuse_models_that_do_not_pair_up(loss):
    batch = random_batch()
    student, teacher = Model(0).outputs(batch), Model(1).outputs(batch)
    (key,) = loss.wants
    with pytest.raises(ValueError, match="equal depth"):
        loss(student, teacher._replace(extras={key: teacher.extras[key][:-1]}), batch)
    with pytest.raises(ValueError, match="equal widths"):
        narrow = tuple(layer[:, :1] for layer in teacher.extras[key])
        loss(student, teacher._replace(extras={key: narrow}), batch)
    with pytest.raises(ValueError, match=f"needs '{key}'"):
        loss(student._replace(extras={}), teacher, batch)
    loss.layers = [7]
    try:
        with pytest.raises(ValueError, match="do not exist"):
            loss(student, teacher, batch)
    finally:
        loss.layers = None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardKL(0.0), "temperature"),
        (lambda: ReverseKL(-1.0), "temperature"),
        (lambda: GeneralizedJSD(temperature=0.0), "temperature"),
        (lambda: GeneralizedJSD(1.5), "beta"),
        (lambda: CAKLD(-0.1), "gamma"),
        (lambda: ForwardKL(chunk_tokens=0), "chunk_tokens"),
        (lambda: TVD(reduction="mean"), "reduction"),
        (lambda: HiddenStates("l1"), "kind"),
        (lambda: HiddenStates(layers=[]), "layers"),
        (lambda: AttentionTransfer([]), "layers"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
