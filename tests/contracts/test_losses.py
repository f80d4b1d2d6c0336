"""The loss contract (docs/architecture.md, section 6), for every loss in `kdqat.losses`.

A new file in the package is found and imported; an import error fails. A loss whose constructor needs arguments
gets them in ARGUMENTS. Every test runs with a head that is only called and with one that is a projection.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil

import pytest
import torch
from torch import nn

import kdqat.losses
from kdqat.losses import (
    CAKLD,
    AttentionTransfer,
    CrossEntropy,
    DistillLoss,
    ForwardKL,
    HiddenStates,
    LogitLoss,
    WeightedSum,
)
from kdqat.losses.select import num_targets
from kdqat.types import Batch
from tests.losses.toy import Model, ragged_batch, random_batch, rows_of


def sum_of_four(**kwargs) -> WeightedSum:
    terms = [cls(**kwargs) for cls in (ForwardKL, CrossEntropy, HiddenStates, AttentionTransfer)]
    return WeightedSum(terms, [1.0, 0.2, 0.5, 0.5])


ARGUMENTS = {WeightedSum: sum_of_four, CAKLD: lambda **kwargs: CAKLD(0.7, **kwargs)}


def found_losses() -> list[type[DistillLoss]]:
    found: set[type[DistillLoss]] = set()
    for module in pkgutil.iter_modules(kdqat.losses.__path__, "kdqat.losses."):  # kernels/ holds none, and needs Triton
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, DistillLoss) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


def make(cls: type[DistillLoss], **kwargs) -> DistillLoss:
    return ARGUMENTS.get(cls, cls)(**kwargs)


@pytest.fixture(autouse=True, params=["head", "projection"])
def _way(request, monkeypatch):
    """Both ways of `losses/chunked.py`."""
    monkeypatch.setattr(Model, "projects", request.param == "projection")


every_loss = pytest.mark.parametrize("cls", found_losses(), ids=lambda cls: cls.__name__)


def run(loss: DistillLoss, batch: Batch, student: Model | None = None):
    student = student or Model(0)
    return loss(student.outputs(batch), Model(1).outputs(batch), batch)


def test_the_walk_finds_the_losses_and_all_of_them_are_public():
    assert len(found_losses()) >= 9
    assert {cls.__name__ for cls in found_losses()} <= set(kdqat.losses.__all__)


@every_loss
def test_a_divergence_is_zero_when_the_student_equals_the_teacher(cls):
    loss = make(cls)
    if isinstance(loss, CrossEntropy | WeightedSum):
        pytest.skip("has a cross-entropy with the labels, which is not zero")
    batch = ragged_batch()
    assert run(loss, batch, student=Model(1)).sum.item() == pytest.approx(0.0, abs=1e-10)
    assert run(loss, batch, student=Model(0)).sum.item() > 1e-3


@every_loss
def test_what_padding_holds_changes_nothing(cls):
    batch, loss = ragged_batch(), make(cls)
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, 3)
    expected, other = run(loss, batch), run(loss, batch._replace(input_ids=ids))
    torch.testing.assert_close(other.sum, expected.sum, rtol=1e-12, atol=0)
    longer = Batch(*(None if x is None else nn.functional.pad(x, (0, 3), value=0) for x in batch))
    torch.testing.assert_close(run(loss, longer).sum, expected.sum, rtol=1e-12, atol=0)
    assert run(loss, longer).num == expected.num


@every_loss
def test_gradients_are_finite_and_padded_positions_get_none(cls):
    batch, loss, student = ragged_batch(), make(cls), Model(0)
    outputs = student.outputs(batch)
    hidden = [outputs.hidden, *outputs.extras["hidden_states"]]
    leaves = [h.detach().clone().requires_grad_() for h in hidden]
    maps = tuple(a.detach().clone().requires_grad_() for a in outputs.extras["attentions"])
    extras = {"hidden_states": tuple(leaves[1:]), "attentions": maps}
    loss(outputs._replace(hidden=leaves[0], extras=extras), Model(1).outputs(batch), batch).sum.backward()
    used = [leaf for leaf in [*leaves, *maps] if leaf.grad is not None]
    counted = kdqat.losses.target_mask(batch)
    assert used
    for leaf in used:
        rows = leaf.grad if leaf.ndim == 3 else leaf.grad.transpose(1, 2)
        assert rows.isfinite().all() and rows[counted].any() and not rows[~counted].any()


@every_loss
def test_a_prediction_across_documents_is_not_counted(cls):
    batch, loss = random_batch(1, 6), make(cls)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    packed = run(loss, batch._replace(segment_ids=segments))
    without = run(loss, batch._replace(labels=batch.labels.index_fill(1, torch.tensor([3]), -100)))
    torch.testing.assert_close(packed.sum, without.sum)
    assert packed.num == without.num == 4


@every_loss
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_one_batch_equals_two_unequal_micro_batches(cls, reduction):
    batch, loss, student = ragged_batch(), make(cls, reduction=reduction), Model(0)
    whole = run(loss, batch, student)
    (whole.sum / whole.num).backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    halves = [rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, 4))]
    step_num = sum(loss.num_targets(half) for half in halves)  # known before any forward pass
    total = 0.0
    for half in halves:
        part = run(loss, half, student).sum / step_num
        part.backward()
        total += part.item()
    assert total == pytest.approx((whole.sum / whole.num).item(), rel=1e-12)
    for ours, parameter in zip(gradients, (p for p in student.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(parameter.grad, ours, rtol=1e-10, atol=1e-14)


@every_loss
def test_reduction_changes_the_number_and_not_the_sum(cls):
    batch = ragged_batch()
    tokens, sequences = run(make(cls), batch), run(make(cls, reduction="sequence_sum"), batch)
    assert torch.equal(tokens.sum, sequences.sum)
    assert (tokens.num.item(), sequences.num.item()) == (15, 3)
    assert tokens.num == num_targets(batch) == make(cls).num_targets(batch)
    assert sequences.num == num_targets(batch, "sequence_sum")


@every_loss
def test_parts_are_scalars_and_named_sums_are_detached(cls):
    loss = make(cls)
    parts = run(loss, ragged_batch())
    assert parts.sum.shape == parts.num.shape == () and parts.sum.requires_grad
    assert parts.by_name and all(v.shape == () and not v.requires_grad for v in parts.by_name.values())
    if isinstance(loss, LogitLoss):
        assert {loss.name, "kl"} <= set(parts.by_name)
        torch.testing.assert_close(parts.by_name[loss.name], parts.sum.detach())


@every_loss
@pytest.mark.parametrize("head", [{"cap": 0.7}, {"bias": True}], ids=["soft-capped", "biased"])
def test_the_models_own_head_makes_the_logits(cls, head):
    loss, batch = make(cls), ragged_batch()
    if not isinstance(loss, LogitLoss):
        pytest.skip("not on logits alone")
    student, teacher = Model(0, **head), Model(1, **head)
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    counted = kdqat.losses.target_mask(batch)
    labels = batch.labels.roll(-1, dims=1)[counted]
    logits, teacher_logits = student.head(outputs.hidden)[counted], teacher.head(targets.hidden)[counted]
    by_hand = loss.token_loss(logits, teacher_logits, labels)
    assert by_hand.shape == labels.shape
    torch.testing.assert_close(loss(outputs, targets, batch).sum, by_hand.sum())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_stay_finite_for_large_logits(cls, dtype):
    batch, loss = random_batch(), make(cls)
    student, teacher = Model(0, scale=1e4).to(dtype), Model(1, scale=1e4).to(dtype)
    parts = loss(student.outputs(batch), teacher.outputs(batch), batch)
    parts.sum.backward()
    assert parts.sum.isfinite() and all(value.isfinite() for value in parts.by_name.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@every_loss
def test_gradient_never_reaches_the_teacher(cls):
    batch, loss = ragged_batch(), make(cls, **({"chunk_tokens": 4} if issubclass(cls, LogitLoss) else {}))
    student, teacher = Model(0), Model(1)
    loss(student.outputs(batch), teacher.outputs(batch), batch).sum.backward()
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


@every_loss
def test_bf16_autocast_gives_an_fp32_loss_close_to_the_fp32_run(cls):
    batch, loss = ragged_batch(), make(cls)
    student, teacher = Model(0).float(), Model(1).float()
    expected = loss(student.outputs(batch), teacher.outputs(batch), batch).sum
    with torch.autocast("cpu", torch.bfloat16):
        parts = loss(student.outputs(batch), teacher.outputs(batch), batch)
        parts.sum.backward()
    assert parts.sum.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in parts.by_name.values())
    torch.testing.assert_close(parts.sum, expected, rtol=0.05, atol=0.0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@every_loss
def test_a_missing_teacher_is_an_error_with_a_remedy_where_one_is_needed(cls):
    batch, loss = random_batch(), make(cls)
    if not loss.needs_teacher:
        assert loss(Model(0).outputs(batch), None, batch).sum.isfinite()
        return
    with pytest.raises(ValueError, match=r"model\.teacher"):
        loss(Model(0).outputs(batch), None, batch)


@every_loss
def test_a_loss_asks_for_all_the_extras_it_reads(cls):
    batch, loss = random_batch(), make(cls)
    wanted = [
        o._replace(extras={key: o.extras[key] for key in loss.wants})
        for o in (Model(0).outputs(batch), Model(1).outputs(batch))
    ]
    assert loss(*wanted, batch).sum.isfinite()


@every_loss
def test_a_loss_is_stateless_and_can_be_copied_and_pickled(cls):
    batch, loss = ragged_batch(), make(cls)
    expected = run(loss, batch).sum
    assert not loss.state_dict() and not list(loss.parameters())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss):
        assert torch.equal(run(twin, batch).sum, expected)


@every_loss
def test_a_token_loss_compiles_without_graph_breaks(cls):
    loss = make(cls)
    if not isinstance(loss, LogitLoss):
        pytest.skip("has no token_loss")
    student, teacher, labels = torch.randn(4, 9), torch.randn(4, 9), torch.arange(4)
    compiled = torch.compile(loss.token_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher, labels), loss.token_loss(student, teacher, labels))
