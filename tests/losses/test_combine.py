"""WeightedSum: the sum of its terms, at the price of one pass of the heads."""

from __future__ import annotations

import pytest
import torch

from kdqat.losses import (
    CAKLD,
    TVD,
    AttentionTransfer,
    CrossEntropy,
    ForwardKL,
    GeneralizedJSD,
    HiddenStates,
    WeightedSum,
)
from tests.losses.toy import Model, ragged_batch, random_batch


def terms() -> list:
    return [ForwardKL(2.0), HiddenStates(), CrossEntropy(), AttentionTransfer(), TVD()]


WEIGHTS = [1.0, 0.3, 0.2, -0.5, 2.0]


def test_a_weighted_sum_equals_the_sum_of_its_terms_in_value_and_gradient():
    batch, student, teacher = ragged_batch(), Model(0, bias=True), Model(1)
    WeightedSum(terms(), WEIGHTS)(student.outputs(batch), teacher.outputs(batch), batch).sum.backward()
    combined = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    parts = [term(outputs, targets, batch) for term in terms()]
    total = sum(weight * part.sum for weight, part in zip(WEIGHTS, parts, strict=True))
    total.backward()
    torch.testing.assert_close(WeightedSum(terms(), WEIGHTS)(outputs, targets, batch).sum, total)
    for ours, parameter in zip(combined, student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-12, atol=1e-14)


def test_every_term_is_logged_unweighted_and_detached():
    batch, student, teacher = ragged_batch(), Model(0), Model(1)
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    by_name = WeightedSum(terms(), WEIGHTS)(outputs, targets, batch).by_name
    assert set(by_name) == {"forward_kl", "hidden_states", "cross_entropy", "attention_transfer", "tvd", "kl"}
    for term in terms():
        torch.testing.assert_close(by_name[term.name], term(outputs, targets, batch).sum.detach())
    torch.testing.assert_close(by_name["kl"], ForwardKL()(outputs, targets, batch).sum.detach())
    assert not any(value.requires_grad for value in by_name.values())


def test_heads_run_once_per_chunk_however_many_terms_there_are():
    batch, student, teacher = random_batch(3, 6), Model(0), Model(1)
    on_logits = [ForwardKL(chunk_tokens=4), CrossEntropy(), GeneralizedJSD(chunk_tokens=9), CAKLD(0.5)]
    loss = WeightedSum(on_logits, [1.0] * 4)
    loss(student.outputs(batch), teacher.outputs(batch), batch)
    assert student.head.rows == teacher.head.rows == [4, 4, 4, 3]  # the smallest chunk_tokens holds


def test_heads_do_not_run_when_no_term_needs_logits():
    batch, student, teacher = random_batch(), Model(0), Model(1)
    parts = WeightedSum([HiddenStates()], [2.0])(student.outputs(batch), teacher.outputs(batch), batch)
    assert student.head.rows == [] and set(parts.by_name) == {"hidden_states"}


def test_two_terms_of_one_class_are_logged_under_two_names():
    batch, student, teacher = random_batch(), Model(0), Model(1)
    loss = WeightedSum([ForwardKL(), ForwardKL(2.0), HiddenStates(), HiddenStates("cosine")], [1.0] * 4)
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    by_name = loss(outputs, targets, batch).by_name
    assert set(by_name) == {"forward_kl", "forward_kl_2", "hidden_states", "hidden_states_2", "kl"}
    assert torch.equal(by_name["kl"], by_name["forward_kl"])
    torch.testing.assert_close(by_name["forward_kl_2"], ForwardKL(2.0)(outputs, targets, batch).sum.detach())
    torch.testing.assert_close(by_name["hidden_states_2"], HiddenStates("cosine")(outputs, targets, batch).sum.detach())


def test_wants_reduction_and_the_need_of_a_teacher_come_from_the_terms():
    loss = WeightedSum(terms(), WEIGHTS)
    assert loss.wants == {"hidden_states", "attentions"} and loss.needs_teacher
    assert WeightedSum([CrossEntropy(reduction="sequence_sum")], [1.0]).reduction == "sequence_sum"
    assert not WeightedSum([CrossEntropy()], [1.0]).needs_teacher


def test_a_missing_teacher_is_reported_for_the_term_that_needs_it():
    batch = random_batch()
    with pytest.raises(ValueError, match="TVD compares with a teacher"):
        WeightedSum([CrossEntropy(), TVD()], [1.0, 1.0])(Model(0).outputs(batch), None, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSum([], []), "0 terms"),
        (lambda: WeightedSum([TVD()], [1.0, 2.0]), "2 entries for 1 terms"),
        (lambda: WeightedSum([TVD()], [float("nan")]), "finite"),
        (lambda: WeightedSum([TVD(), CrossEntropy(reduction="sequence_sum")], [1.0, 1.0]), "reduction"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
