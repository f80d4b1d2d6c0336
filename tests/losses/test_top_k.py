"""A teacher's top k and the student's own tail: k + 1 buckets, in value and in gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdqat.losses import (
    CAKLD,
    TVD,
    AttentionTransfer,
    CrossEntropy,
    ForwardKL,
    GeneralizedJSD,
    HiddenStates,
    ReverseKL,
    WeightedSum,
)
from kdqat.losses.top_k import TopKRows, dense_log_probs
from kdqat.metrics import kl_divergence
from kdqat.types import Batch, TopKOutputs
from tests.losses.toy import VOCABULARY, Model, ragged_batch, random_batch

DIVERGENCES = [ForwardKL(), ReverseKL(), GeneralizedJSD(), GeneralizedJSD(0.2), TVD()]


def top_k(logits: Tensor, k: int, dtype: torch.dtype | None = None) -> TopKOutputs:
    """What a teacher with these logits [B, T, V] keeps."""
    log_p = logits.detach().log_softmax(-1)
    kept, ids = log_p.topk(k, dim=-1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopKOutputs(ids, kept.to(dtype or kept.dtype), rest.to(dtype or rest.dtype), {})


def rows_of(logits: Tensor, k: int, dtype: torch.dtype | None = None) -> TopKRows:
    return TopKRows(*top_k(logits, k, dtype)[:3])


def kept_by(model: Model, batch: Batch, k: int) -> TopKOutputs:
    outputs = model.outputs(batch)
    return top_k(outputs.head(outputs.hidden), k)


def buckets(log_p: Tensor, ids: Tensor) -> Tensor:
    """[n, V] -> [n, k + 1]: the k tokens and all others."""
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], -1)


def random_logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(6, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5, 39])
@pytest.mark.parametrize("loss", DIVERGENCES, ids=lambda loss: f"{loss.name}{getattr(loss, 'beta', '')}")
def test_a_divergence_equals_that_over_k_plus_one_buckets_in_value_and_gradient(loss, k):
    teacher, student = rows_of(random_logits(0), k), random_logits(1)
    log_p = torch.cat([teacher.log_probs, teacher.log_tail[:, None]], -1)
    ours, by_hand = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = loss.token_loss(ours, dense_log_probs(teacher, ours), None)
    expected = loss.token_loss(buckets(by_hand.log_softmax(-1), teacher.ids), log_p, None)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert value.min() > 1e-4 and not dense_log_probs(teacher, ours).requires_grad
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, by_hand.grad, rtol=1e-10, atol=1e-14)


def test_the_whole_vocabulary_kept_is_the_dense_teacher():
    logits = random_logits(0)
    teacher = rows_of(logits, 40)
    assert torch.isneginf(teacher.log_tail).all()
    torch.testing.assert_close(dense_log_probs(teacher, random_logits(1)), logits.log_softmax(-1), rtol=1e-12, atol=0)


def test_no_tail_means_that_no_other_token_has_any_probability():
    teacher = rows_of(random_logits(0), 3)._replace(log_tail=torch.full((6,), -torch.inf))
    student = random_logits(1).requires_grad_()
    dense = dense_log_probs(teacher, student)
    assert (dense.exp() > 0).sum(-1).tolist() == [3] * 6
    loss = ForwardKL().token_loss(student, dense, None)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_stored_in_16_bits_sum_to_one_again(dtype):
    logits = random_logits(0).float()
    teacher = rows_of(logits, 8, dtype)
    stored = teacher.log_probs.double().exp().sum(-1) + teacher.log_tail.double().exp()
    assert (stored - 1).abs().max() > 1e-5
    dense = dense_log_probs(teacher, random_logits(1).float())
    assert dense.dtype == torch.float32 and (dense.double().exp().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("sure", [30.0, 60.0])
def test_a_student_that_is_sure_of_itself_has_a_tail_all_the_same(sure):
    student = torch.zeros(1, 40)
    student[0, 3] = sure  # the others have 4e-12 or 3e-25 together: nothing is left of 1 - q[3] in fp32
    teacher = TopKRows(torch.tensor([[3]]), torch.tensor([[math.log(0.75)]]), torch.tensor([math.log(0.25)]))
    dense = dense_log_probs(teacher, student)
    torch.testing.assert_close(dense.exp(), torch.full((1, 40), 0.25 / 39).index_fill(1, torch.tensor([3]), 0.75))


def test_a_student_that_forbids_the_whole_tail_gives_no_nan():
    student = torch.full((1, 6), -torch.inf)
    student[0, 2] = 0.0
    teacher = TopKRows(torch.tensor([[2]]), torch.tensor([[math.log(0.75)]]), torch.tensor([math.log(0.25)]))
    assert not dense_log_probs(teacher, student).isnan().any()


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        ForwardKL(chunk_tokens=4),
        ReverseKL(2.0),
        CAKLD(None),
        CrossEntropy(),
        WeightedSum([ForwardKL(chunk_tokens=4), CrossEntropy()], [1.0, 0.3]),
    ],
    ids=lambda loss: loss.name,
)
def test_all_kept_gives_the_loss_the_log_and_the_gradients_of_the_dense_teacher(loss, projects, monkeypatch):
    monkeypatch.setattr(Model, "projects", projects)
    batch, student, teacher = ragged_batch(), Model(0, cap=0.7, bias=True), Model(1)
    results = []
    for targets in (teacher.outputs(batch), kept_by(teacher, batch, VOCABULARY)):
        student.zero_grad()
        parts = loss(student.outputs(batch), targets, batch)
        parts.sum.backward()
        results.append((parts.sum, parts.by_name, [p.grad.clone() for p in student.parameters()]))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("projects", [False, True])
def test_few_kept_give_the_same_on_both_ways(projects, monkeypatch):
    monkeypatch.setattr(Model, "projects", projects)
    batch, student = ragged_batch(), Model(0, bias=True)
    targets = kept_by(Model(1), batch, 3)
    outputs = student.outputs(batch)
    parts = ForwardKL(chunk_tokens=4)(outputs, targets, batch)
    parts.sum.backward()
    ours = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    outputs = student.outputs(batch)
    counted = (batch.labels[:, 1:] != -100) & batch.attention_mask[:, :-1].bool()
    ids, kept, rest = (values[:, :-1][counted] for values in targets[:3])
    log_q = buckets(outputs.head(outputs.hidden)[:, :-1][counted].log_softmax(-1), ids)
    plain = kl_divergence(torch.cat([kept, rest[:, None]], -1), log_q).sum()
    plain.backward()
    torch.testing.assert_close(parts.sum, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, [p.grad for p in student.parameters()], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("projects", [False, True])
def test_a_token_beyond_the_students_vocabulary_is_named(projects, monkeypatch):
    monkeypatch.setattr(Model, "projects", projects)
    batch = random_batch()
    targets = kept_by(Model(1), batch, VOCABULARY)  # ids up to 10
    with pytest.raises(ValueError, match="kept token 10 and the student has 8 logits"):
        ForwardKL()(Model(0, cut=8).outputs(batch), targets, batch)


def test_a_teacher_of_other_positions_is_refused():
    batch = random_batch(2, 4)
    targets = kept_by(Model(1), random_batch(2, 5), 3)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4\)"):
        ForwardKL()(Model(0).outputs(batch), targets, batch)


@pytest.mark.parametrize("loss", [HiddenStates(), AttentionTransfer(), WeightedSum([TVD(), HiddenStates()], [1, 1])])
def test_a_loss_on_more_than_logits_says_that_a_cached_teacher_has_none(loss):
    batch = random_batch()
    with pytest.raises(ValueError, match="a cached teacher holds logits only"):
        loss(Model(0).outputs(batch), kept_by(Model(1), batch, 3), batch)


def test_a_compiled_chunk_rebuilds_the_teacher_without_graph_breaks():
    from kdqat.losses.chunk import chunk_sums

    torch._dynamo.reset()
    arguments = (ForwardKL().token_loss, TVD().token_loss), (), None, random_logits(1), rows_of(random_logits(0), 5)
    compiled = torch.compile(chunk_sums, fullgraph=True, backend="eager")(*arguments, torch.zeros(6).long())
    torch.testing.assert_close(compiled, chunk_sums(*arguments, torch.zeros(6).long()))
