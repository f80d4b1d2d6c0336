"""One optimizer step is one step, however it is cut into micro-batches; and the teacher is in nothing that is saved."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from kdqat.losses import CrossEntropy, ForwardKL, ReverseKL, WeightedSum
from kdqat.models import ModelSource
from kdqat.training import KDQATModule
from kdqat.types import Batch
from tests.training.toy import batch, joined, make_module, train

SGD = partial(torch.optim.SGD, lr=1.0)
PARTS = [batch(2, labelled=9, seed=1), batch(2, labelled=2, seed=2)]


def weights_after(batches: list[Batch], module: KDQATModule | None = None, **args: Any) -> dict[str, torch.Tensor]:
    module = make_module(optimizer=SGD) if module is None else module
    train(module, batches, **args)
    assert module.split is not None
    return {name: p.detach().clone() for name, p in module.split.named_parameters()}


def require_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    start = dict(make_module().build().split.named_parameters())
    for name in start:
        step = (one[name] - start[name]).detach().abs().max()
        assert step > 0, name
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=float(1e-4 * step), msg=name)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_unequal_micro_batches_step_as_one_large_batch(clip: float | None) -> None:
    cut = weights_after(PARTS, accumulate_grad_batches=2, gradient_clip_val=clip)
    whole = weights_after([joined(PARTS)], gradient_clip_val=clip)
    require_close(cut, whole)


@pytest.mark.parametrize(
    "loss",
    [CrossEntropy, lambda: ReverseKL(reduction="sequence_sum"),
     lambda: WeightedSum([ForwardKL(), CrossEntropy()], [1.0, 0.3])],
    ids=["cross-entropy", "sequence sum", "weighted sum"],
)  # fmt: skip
def test_every_reduction_survives_the_cut(loss: Any) -> None:
    cut = weights_after(PARTS, make_module(loss=loss(), optimizer=partial(SGD, lr=1e-2)), accumulate_grad_batches=2)
    whole = weights_after([joined(PARTS)], make_module(loss=loss(), optimizer=partial(SGD, lr=1e-2)))
    require_close(cut, whole)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches() -> None:
    three = [*PARTS, batch(2, labelled=5, seed=3)]
    cut = weights_after(three, accumulate_grad_batches=2)
    whole = weights_after([joined(PARTS), three[2]])
    require_close(cut, whole)


def test_a_micro_batch_without_labels_changes_nothing() -> None:
    empty = Batch(PARTS[0].input_ids, torch.full_like(PARTS[0].labels, -100))
    require_close(weights_after([PARTS[0], empty], accumulate_grad_batches=2), weights_after([PARTS[0]]))


def test_the_log_has_the_mean_over_the_step_not_over_micro_batches() -> None:
    cut = train(make_module(), PARTS, accumulate_grad_batches=2).callback_metrics
    whole = train(make_module(), [joined(PARTS)]).callback_metrics
    # a KL of 1.6e-4 is what fp32 leaves of differences of log-probabilities near 5; it moves with the thread count
    assert float(cut["train/kl"]) == pytest.approx(float(whole["train/kl"]), rel=1e-3)
    means = [float(train(make_module(), [part]).callback_metrics["train/kl"]) for part in PARTS]
    assert sum(means) / 2 != pytest.approx(float(whole["train/kl"]), rel=5e-3)  # what the wrong mean would give
    assert float(cut["train/loss"]) == pytest.approx(float(cut["train/kl"]))


def test_gradients_are_those_of_the_mean_loss_by_autograd() -> None:
    module = make_module(optimizer=SGD)
    student = module.build()
    teacher = module.teacher
    assert teacher is not None
    parts = ForwardKL()(student.split(PARTS[0]), teacher.outputs(PARTS[0]), PARTS[0])
    named = dict(student.split.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(parts.sum / parts.num, list(named.values())), strict=True))
    rate = {name: 0.1 if "fake_quantizer" in name else 1.0 for name in named}
    expected = {name: (p - rate[name] * grads[name]).detach().clone() for name, p in named.items()}
    require_close(weights_after([PARTS[0]], module), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_steps_gradients_are_gone_before_the_forward_pass_and_within_a_step_they_stay(accumulate: int) -> None:
    module, seen = make_module(optimizer=SGD), []
    assert module.build().split is not None
    module.split.register_forward_pre_hook(
        lambda split, _: seen.append(any(p.grad is not None for p in split.parameters())) if split.training else None
    )
    train(module, PARTS * 2, accumulate_grad_batches=accumulate)
    assert seen == ([False] * 4 if accumulate == 1 else [False, True] * 2)


def test_the_teacher_is_in_no_state_no_parameter_and_no_optimizer() -> None:
    module = make_module()
    trainer = train(module, PARTS)
    assert module.teacher is not None and module.split is not None
    teachers = {id(p) for p in module.teacher.split.parameters()}  # type: ignore[attr-defined]
    assert teachers and not teachers & {id(p) for p in module.parameters()}
    assert not teachers & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert set(module.state_dict()) == {f"split.{name}" for name in module.split.state_dict()}
    assert not any(p.requires_grad for p in module.teacher.split.parameters())  # type: ignore[attr-defined]
    assert not module.teacher.split.training  # type: ignore[attr-defined]


def test_training_leaves_the_teacher_as_it_was_and_moves_student_and_scales() -> None:
    module = make_module()
    module.build()
    assert module.teacher is not None and module.split is not None
    before = {n: p.clone() for n, p in module.teacher.split.named_parameters()}  # type: ignore[attr-defined]
    own = {n: p.detach().clone() for n, p in module.split.named_parameters()}
    train(module, PARTS)
    assert all(torch.equal(before[n], p) for n, p in module.teacher.split.named_parameters())  # type: ignore[attr-defined]
    assert all(not torch.equal(own[n], p) for n, p in module.split.named_parameters())


def test_validation_is_weighted_by_tokens_and_leaves_no_trace() -> None:
    module = make_module()
    trainer = train(module, PARTS[:1], val=PARTS)
    whole = make_module()
    once = train(whole, PARTS[:1], val=[joined(PARTS)])
    for name in ("val/kl", "val/perplexity"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(once.callback_metrics[name]), rel=1e-5)
    require_close(*[dict(m.split.named_parameters()) for m in (module, whole)])  # type: ignore[union-attr]


def test_a_student_is_built_once() -> None:
    module = make_module()
    assert module.build() is module.build()
    adopted = KDQATModule.from_student(module.build(), plan=module.allocator, quantizer=module.quantizer,
                                       loss=ForwardKL(), optimizer=SGD)  # fmt: skip
    assert adopted.build() is module.build()


def test_the_constructor_loads_nothing() -> None:
    module = make_module(student=ModelSource("nowhere/at-all"))
    assert list(module.parameters()) == []


def test_half_precision_latent_weights_are_refused() -> None:
    module = make_module(student=ModelSource("toy:llama", "bfloat16"))
    with pytest.raises(ValueError, match=r"bfloat16 and AdamW: latent weights are trained in float32.*bf16-mixed"):
        module.require_training()
    assert module.student is None  # nothing was loaded for that


def test_masked_language_models_are_refused_in_training() -> None:
    from kdqat.allocate import Uniform

    with pytest.raises(ValueError, match="toy:bert: only causal language models"):
        make_module(student=ModelSource("toy:bert"), plan=Uniform("W4A16_G32", ignore=["cls*"])).build()
