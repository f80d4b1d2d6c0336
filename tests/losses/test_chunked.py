"""Chunk by chunk equals all at once, in value and gradient; and never holds more than a chunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.losses import CrossEntropy, ForwardKL, GeneralizedJSD
from kdqat.metrics import token_kl
from kdqat.types import Outputs
from tests.losses.toy import VOCABULARY, Head, Model, ragged_batch, random_batch

NUM_TARGETS = 15  # of ragged_batch
HEADS = {
    "plain": {},
    "biased": {"bias": True},
    "soft-capped": {"cap": 0.7},
    "tied": {"tied": True},
    "all of it": {"bias": True, "cap": 0.7, "tied": True},
}


def value_and_gradients(loss, student: Model, teacher: Model, batch):
    student.zero_grad()
    outputs = student.outputs(batch)
    outputs.hidden.retain_grad()
    total = loss(outputs, teacher.outputs(batch), batch).sum
    total.backward()
    return [total.detach(), outputs.hidden.grad, *(p.grad.clone() for p in student.parameters())]


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, NUM_TARGETS])
def test_chunks_give_the_value_and_the_gradients_of_the_whole(head, chunk_tokens):
    batch = ragged_batch()
    student, teacher = Model(0, **head), Model(1, **head)
    ours = value_and_gradients(ForwardKL(chunk_tokens=chunk_tokens), student, teacher, batch)

    student.zero_grad()
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    outputs.hidden.retain_grad()
    counted = (batch.labels[:, 1:] != -100) & batch.attention_mask[:, :-1].bool()
    logits, teacher_logits = outputs.head(outputs.hidden)[:, :-1], targets.head(targets.hidden)[:, :-1].detach()
    plain = token_kl(teacher_logits[counted], logits[counted]).sum()
    plain.backward()
    plain_values = [plain.detach(), outputs.hidden.grad, *(p.grad for p in student.parameters())]
    for a, b in zip(ours, plain_values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [CrossEntropy, GeneralizedJSD])
def test_other_losses_do_not_depend_on_the_chunk_either(loss):
    batch, student, teacher = ragged_batch(), Model(0, cap=0.7), Model(1)
    whole = value_and_gradients(loss(), student, teacher, batch)
    for a, b in zip(value_and_gradients(loss(chunk_tokens=4), student, teacher, batch), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_no_head_call_and_no_saved_tensor_holds_more_than_a_chunk():
    batch, student, teacher = random_batch(4, 9), Model(0), Model(1)
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts = ForwardKL(chunk_tokens=5)(outputs, targets, batch)
    assert not any(shape[-1:] == (VOCABULARY,) and len(shape) == 2 for shape in saved)
    assert student.head.rows == teacher.head.rows == [5] * 6 + [2]
    parts.sum.backward()
    assert max(student.head.rows) == 5


def test_one_chunk_is_not_recomputed_and_several_are_recomputed_once():
    batch, student, teacher = random_batch(2, 4), Model(0), Model(1)
    ForwardKL(chunk_tokens=6)(student.outputs(batch), teacher.outputs(batch), batch).sum.backward()
    assert student.head.rows == [6]
    student.head.rows.clear()
    ForwardKL(chunk_tokens=3)(student.outputs(batch), teacher.outputs(batch), batch).sum.backward()
    assert student.head.rows == [3] * 4


def test_what_is_only_logged_is_not_recomputed_in_backward(monkeypatch):
    import kdqat.losses.logits as logits

    calls = []
    monkeypatch.setattr(logits, "token_kl", lambda t, s: calls.append(1) or token_kl(t, s))
    batch, student, teacher = random_batch(2, 4), Model(0), Model(1)
    GeneralizedJSD(chunk_tokens=3)(student.outputs(batch), teacher.outputs(batch), batch).sum.backward()
    assert len(calls) == 2


def test_two_vocabularies_are_refused_and_both_sizes_named():
    batch, student, teacher = random_batch(), Model(0), Model(1)
    padded = Outputs(teacher.outputs(batch).hidden, Head(vocabulary=16).double(), {})
    with pytest.raises(ValueError, match=r"16 entries.*11"):
        ForwardKL()(student.outputs(batch), padded, batch)


def test_a_micro_batch_without_targets_gives_zero_and_can_still_run_backward():
    batch = random_batch(2, 3)
    batch = batch._replace(labels=torch.full_like(batch.labels, -100))
    student, teacher = Model(0), Model(1)
    parts = ForwardKL()(student.outputs(batch), teacher.outputs(batch), batch)
    parts.sum.backward()
    assert parts.sum.item() == 0 and parts.num.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_the_teachers_head_runs_in_its_own_dtype_and_without_graph_under_autocast():
    seen = []

    class Spy(nn.Linear):
        def forward(self, hidden):
            logits = super().forward(hidden)
            graph = hidden.requires_grad, torch.is_grad_enabled()
            seen.append((torch.is_autocast_enabled("cpu"), *graph, logits.dtype))
            return logits

    batch = random_batch()
    student = Outputs(torch.randn(3, 6, 5, requires_grad=True), Spy(5, 11), {})
    teacher = Outputs(torch.randn(3, 6, 5, requires_grad=True), Spy(5, 11), {})
    with torch.autocast("cpu", torch.bfloat16):
        ForwardKL()(student, teacher, batch)
    assert seen == [(True, True, True, torch.bfloat16), (False, False, False, torch.float32)]


def test_a_head_shared_with_the_teacher_keeps_its_gradient_under_autocast():
    batch, head = random_batch(), nn.Linear(5, 11)
    hidden = torch.randn(3, 6, 5)
    student, teacher = Outputs(hidden, head, {}), Outputs(hidden + 0.5, head, {})
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):  # the second call would find a weight that was cast and cached without a graph
            head.zero_grad()
            ForwardKL(chunk_tokens=4)(student, teacher, batch).sum.backward()
            assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0


def test_chunks_give_the_gradients_of_the_whole_under_autocast_too():
    batch, student, teacher = ragged_batch(), Model(0, bias=True).float(), Model(1).float()
    gradients = []
    for chunk_tokens in (4, NUM_TARGETS):
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(value_and_gradients(ForwardKL(chunk_tokens=chunk_tokens), student, teacher, batch))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)  # bf16 sums of the head's gradient
