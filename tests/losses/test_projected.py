"""A head that is one matmul: the gradient made in the forward pass is the plain one, and no logits outlive a chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdqat.losses.chunk as chunk
import kdqat.losses.projected as projected
from kdqat.losses import CAKLD, TVD, CrossEntropy, ForwardKL, GeneralizedJSD, LogitLoss, ReverseKL, WeightedSum
from kdqat.losses.select import target_mask
from kdqat.types import Outputs
from tests.losses.toy import VOCABULARY, WIDTH, Head, Model, assert_near, ragged_batch, random_batch

LOSSES = {
    "forward": lambda **k: ForwardKL(**k),
    "forward, T=2": lambda **k: ForwardKL(2.0, **k),
    "reverse, T=0.5": lambda **k: ReverseKL(0.5, **k),
    "jsd": lambda **k: GeneralizedJSD(0.3, temperature=1.5, **k),
    "cakld": lambda **k: CAKLD(None, **k),
    "tvd": lambda **k: TVD(**k),
    "cross-entropy": lambda **k: CrossEntropy(**k),
    "kl + ce": lambda **k: WeightedSum([ForwardKL(**k), CrossEntropy(**k)], [1.0, 0.3]),
}
HEADS = {
    "plain": {},
    "biased": {"bias": True},
    "soft-capped": {"cap": 0.7},
    "cut": {"cut": 8},
    "tied": {"tied": True},
    "all of it": {"bias": True, "cap": 0.7, "cut": 8, "tied": True},
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def _projects(monkeypatch):
    monkeypatch.setattr(Model, "projects", True)


def batch_of(kind: str):
    """Padding and prompts, or packed documents; labels are below 8."""
    batch = ragged_batch() if kind == "masks" else random_batch(2, 8)
    batch = batch._replace(labels=torch.where(batch.labels < 8, batch.labels, batch.labels.clamp(max=7)))
    if kind == "segments":
        batch = batch._replace(segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0] * 5 + [1] * 3]))
    return batch


def gradients(total: Tensor, outputs: Outputs, student: Model) -> list[Tensor]:
    student.zero_grad()
    outputs.hidden.retain_grad()
    total.backward()
    return [total.detach(), outputs.hidden.grad, *(p.grad.clone() for p in student.parameters())]


def plain_total(loss, outputs: Outputs, targets: Outputs, batch) -> Tensor:
    """All logits at once, and autograd through them."""
    if isinstance(loss, WeightedSum):
        terms = zip(loss.weights, loss.terms, strict=True)
        return sum(weight * plain_total(term, outputs, targets, batch) for weight, term in terms)
    counted = target_mask(batch)
    logits, teacher_logits = outputs.head(outputs.hidden)[counted], targets.head(targets.hidden)[counted].detach()
    return loss.token_loss(logits, teacher_logits, batch.labels.roll(-1, dims=1)[counted]).sum()


@every_loss
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", ["masks", "segments"])
def test_value_and_gradients_are_those_of_all_logits_at_once(make, head, kind):
    batch, student = batch_of(kind), Model(0, **head).float()
    teacher = Model(1, cut=head.get("cut")).float()
    outputs, targets, loss = student.outputs(batch), teacher.outputs(batch), make(chunk_tokens=4)
    parts = loss(outputs, targets, batch)
    ours = gradients(parts.sum, outputs, student)
    assert student.head.rows == []
    outputs = student.outputs(batch)
    assert_near(ours, gradients(plain_total(loss, outputs, targets, batch), outputs, student), 1e-6)


@every_loss
def test_what_is_logged_is_what_the_recomputing_way_logs(make):
    batch, student, teacher = ragged_batch(), Model(0, bias=True), Model(1)
    outputs, targets = student.outputs(batch), teacher.outputs(batch)
    ours = make(chunk_tokens=4)(outputs, targets, batch).by_name
    theirs = make(chunk_tokens=4)(outputs._replace(projection=None), targets, batch).by_name
    assert set(ours) == set(theirs) and student.head.rows
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=0)
        assert not ours[name].requires_grad


@every_loss
def test_an_eager_loss_over_a_few_rows_at_a_time_is_the_same(make, monkeypatch):
    batch, student, teacher = ragged_batch(), Model(0, cap=0.7), Model(1)
    values = []
    for logits in (projected.EAGER_LOGITS, 2 * VOCABULARY, 1):
        monkeypatch.setattr(projected, "EAGER_LOGITS", logits)
        outputs = student.outputs(batch)
        total = make(chunk_tokens=7)(outputs, teacher.outputs(batch), batch).sum
        values.append(gradients(total, outputs, student))
    assert_near(values[1], values[0], 1e-12)
    assert_near(values[2], values[0], 1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen, monkeypatch):
    products = []
    monkeypatch.setattr("kdqat.losses.head_gradient.add_product", lambda total, *_: products.append(total.shape))
    batch, head = random_batch(), Head(bias=True)
    leaves = {"hidden": torch.randn(3, 6, 5), "weight": head.linear.weight, "bias": head.linear.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    outputs = Outputs(leaves["hidden"], head, {}, head.projection)
    ForwardKL()(outputs, Model(1).float().outputs(batch), batch).sum.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}
    expected = {"hidden": torch.Size([15, 5]), "weight": torch.Size([VOCABULARY, 5])}
    assert products == [shape for name, shape in expected.items() if name != frozen]


def test_without_grad_no_gradient_is_made(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    batch = random_batch()
    with torch.no_grad():
        total = ForwardKL()(Model(0).outputs(batch), Model(1).outputs(batch), batch).sum
    assert total > 0 and not total.requires_grad


@pytest.mark.parametrize("make", [lambda: ForwardKL(), lambda: WeightedSum([TVD(), CrossEntropy()], [1.0, 2.0])])
def test_a_micro_batch_without_targets_gives_zero_and_can_still_run_backward(make):
    batch = random_batch(2, 3)
    batch = batch._replace(labels=torch.full_like(batch.labels, -100))
    student = Model(0, bias=True)
    parts = make()(student.outputs(batch), Model(1).outputs(batch), batch)
    parts.sum.backward()
    assert parts.sum.item() == 0 and parts.num.item() == 0 and not any(parts.by_name.values())
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_the_head_is_asked_for_its_weight_once_a_batch():
    batch, student, calls = random_batch(), Model(0), []
    outputs = student.outputs(batch)
    counted = outputs._replace(projection=lambda: calls.append(1) or student.head.projection())
    ForwardKL(chunk_tokens=2)(counted, Model(1).outputs(batch), batch).sum.backward()
    assert calls == [1]


def test_gradients_are_handed_on_and_a_second_backward_pass_says_so():
    batch = random_batch()
    total = ForwardKL()(Model(0).outputs(batch), Model(1).outputs(batch), batch).sum
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it anew"):
        total.backward()


class Spy(TorchDispatchMode):
    """Shapes and dtypes of all tensors that operations give; how often a weight was cast."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], torch.dtype]] = set()
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.add((tuple(out.shape), out.dtype))
            self.casts += func is torch.ops.aten._to_copy.default and out.shape == (VOCABULARY, WIDTH)
        return out


def test_no_logits_beyond_a_chunk_exist_and_none_are_kept_for_the_backward_pass(monkeypatch):
    batch, student, teacher = random_batch(4, 9), Model(0).float(), Model(1).bfloat16()
    outputs, targets, saved = student.outputs(batch), teacher.outputs(batch), []
    monkeypatch.setattr(projected, "EAGER_LOGITS", 3 * VOCABULARY)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x)
    with torch.autocast("cpu", torch.bfloat16), Spy() as spy, keep:
        total = ForwardKL(chunk_tokens=5)(outputs, targets, batch).sum
        during = set(spy.seen)
        alive = [shape for shape in saved if shape[-1:] == (VOCABULARY,)]
        total.backward()
    assert spy.casts == 1  # of the student's weight; the gradient is in fp32 as it is
    rows = {dtype: {s[0] for s, d in during if s[1:] == (VOCABULARY,) and d == dtype} for _, dtype in during}
    assert max(rows[torch.bfloat16]) == 5 and max(rows[torch.float32]) == 3  # 2-D in fp32 only a few rows at a time
    assert all(len(shape) < 2 or shape[0] <= 3 for shape in alive)
    assert all(shape[-1:] != (VOCABULARY,) for shape, _ in spy.seen - during)


def count_compiled_frames(monkeypatch) -> list[int]:
    """Replaces the compiler by one that counts graphs, over a fresh cache; the last place is what counts."""
    torch._dynamo.reset()
    count = [0]

    def backend(graph, inputs):
        count[0] += 1
        return graph.forward

    monkeypatch.setattr(projected, "_compiled_chunk_sums", lambda: torch.compile(chunk.chunk_sums, backend=backend))
    return count


def test_another_number_of_tokens_compiles_nothing_anew(monkeypatch):
    count, loss = count_compiled_frames(monkeypatch), WeightedSum([ForwardKL(2.0, chunk_tokens=4), TVD()], [1.0, 0.5])
    loss.compile_chunks()
    student, teacher = Model(0, cap=0.7), Model(1)
    for rows, tokens in ((2, 6), (1, 8), (3, 6), (1, 12)):  # last chunks of 2, 3, 3 and 3 of 4
        batch = random_batch(rows, tokens)
        parts = loss(student.outputs(batch), teacher.outputs(batch), batch)
        outputs = student.outputs(batch)._replace(projection=None)
        torch.testing.assert_close(parts.sum, loss(outputs, teacher.outputs(batch), batch).sum)
    assert count == [1]


@pytest.mark.parametrize("make", [ForwardKL, lambda: WeightedSum([ForwardKL(), CrossEntropy()], [1.0, 0.2])])
def test_compiling_is_off_until_asked_for(make, monkeypatch):
    count, loss, batch = count_compiled_frames(monkeypatch), make(), random_batch()
    loss(Model(0).outputs(batch), Model(1).outputs(batch), batch)
    assert count == [0]


def test_a_loss_that_ignores_the_student_gives_zero_gradients():
    class Constant(LogitLoss):
        def token_loss(self, student_logits, teacher_logits, labels):
            return torch.ones_like(labels, dtype=torch.float32)

    batch, student = random_batch(), Model(0)
    Constant()(student.outputs(batch), Model(1).outputs(batch), batch).sum.backward()
    assert all(not p.grad.any() for p in student.parameters())
