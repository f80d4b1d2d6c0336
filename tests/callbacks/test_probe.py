"""The probe looks into every layer, gets autograd's numbers, and leaves everything as it was."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kdqat.callbacks import GradientLog, OscillationLog, SignalLog
from kdqat.losses import ForwardKL
from kdqat.models import CachedTeacher, SharedTeacher, blocks_of
from kdqat.quant import FakeQuantLinear
from kdqat.training import KDQATModule, Parallel
from kdqat.training.probe import Seen, compare, cut, plainly
from kdqat.training.probe.passes import probe_pass
from tests.training.toy import batch, built, make_module, train

BATCH = batch(2, seed=5)


def probed(module: KDQATModule, **options: Any) -> Any:
    names = [name for name in module.student.layers if "lm_head" not in name]
    return probe_pass(
        module.split, BATCH, names, teacher=module.teacher, loss=module.loss, context=nullcontext, **options
    )


def test_weight_energies_are_those_of_the_gradient_at_the_fake_quantized_weight() -> None:
    module = built()
    module.split.eval()
    names, energies = probed(module, gradients=True).loss["weight_energy"]
    weights: dict[str, Any] = {}
    for name in names:
        quantizer = module.student.layers[name].weight_fake_quantizer
        quantizer.register_forward_hook(lambda _, __, out, name=name: weights.__setitem__(name, out))
    parts = ForwardKL()(module.split(BATCH), module.teacher.outputs(BATCH), BATCH)
    gradients = torch.autograd.grad(parts.sum / parts.num, [weights[name] for name in names])
    expected = torch.stack([gradient.square().sum() for gradient in gradients])
    assert len(names) == 14 and torch.allclose(energies, expected, rtol=1e-4)


def test_activation_energies_are_those_of_the_gradient_at_the_output() -> None:
    module = built()
    module.split.eval()
    names, energies = probed(module, gradients=True).loss["activation_energy"]
    outputs: dict[str, Any] = {}
    for name in names:
        module.student.layers[name].register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
    parts = ForwardKL()(module.split(BATCH), module.teacher.outputs(BATCH), BATCH)
    gradients = torch.autograd.grad(parts.sum / parts.num, [outputs[name] for name in names])
    assert torch.allclose(energies, torch.stack([g.square().sum() for g in gradients]), rtol=1e-4)


def test_frozen_layers_have_the_energies_they_would_have_if_they_were_trained() -> None:
    trained, frozen = built(), built()
    frozen.split.requires_grad_(False)
    for metric in ("weight_energy", "activation_energy"):
        ours, theirs = (probed(module, gradients=True).loss[metric] for module in (frozen, trained))
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_it_touches_no_gradient_draws_no_number_and_leaves_modes_and_attention_alone() -> None:
    module = built()
    module.split.train()
    random, attention = torch.get_rng_state(), module.split.model.config._attn_implementation
    seen = probed(module, gradients=True, attention=True)
    assert all(parameter.grad is None for parameter in module.split.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in module.split.modules())
    assert module.split.model.config._attn_implementation == attention != "eager"
    assert not any(m._forward_hooks for m in module.split.modules())
    assert not any("fake_quantized_weight" in vars(layer) for layer in module.student.layers.values())
    assert len(seen.student.entropy) == len(seen.teacher.entropy) == 2


def test_compiled_and_checkpointed_blocks_are_run_as_they_are_written_once_and_put_back() -> None:
    module = built()
    Parallel(checkpoint_blocks="selective").apply(module.split, None)
    module.split.train()
    block, calls = blocks_of(module.split.model)[0], []
    forward, compiled = block.__dict__["forward"], object()
    block._compiled_call_impl = compiled
    block.mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    probed(module, gradients=True)
    assert calls == [1]
    assert block._compiled_call_impl is compiled and block.__dict__["forward"] is forward


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    module = built()
    module.split.train()
    with pytest.raises(RuntimeError), plainly(module.split, eager_attention=True):
        raise RuntimeError
    assert module.split.training and module.split.model.config._attn_implementation == "sdpa"


def test_padding_counts_nowhere() -> None:
    y = torch.randn(1, 4, 3)
    other = y.clone()
    other[0, 3] += 100
    real = torch.tensor([0, 1, 2])
    seen = [Seen({"layer": tensor}, {}, {"attention": tensor.abs()}) for tensor in (other, y)]
    values = compare(*seen, real)
    assert values["gain"][1].item() == 1 and values["sqnr_db"][1].item() == float("inf")


def test_a_batch_is_cut_to_a_corner_that_has_targets() -> None:
    small = cut(batch(4, 12, labelled=3), 2, 5)
    assert small.input_ids.shape == (2, 5) and torch.equal(small.labels, small.input_ids)
    assert torch.equal(cut(batch(4, 12), 1, 256).labels, batch(4, 12).labels[:1])


@pytest.mark.parametrize("observer", [SignalLog, GradientLog])
def test_a_teacher_that_only_has_answers_is_refused_before_anything_is_loaded(observer: Any) -> None:
    module = make_module(teacher=CachedTeacher())
    with pytest.raises(ValueError, match=r"live teacher.*a CachedTeacher: use a FrozenTeacher"):
        train(module, [BATCH], callbacks=[observer()])
    assert module.student is None


def test_a_shared_teacher_is_the_student_in_full_precision() -> None:
    shared, frozen = built(teacher=SharedTeacher(), trainable="scales"), built()
    seen = [probed(module) for module in (shared, frozen)]
    ours, theirs = (compare(one.student, one.teacher)["sqnr_db"][1] for one in seen)
    assert torch.allclose(ours, theirs)


def test_weights_are_constants_for_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    module, learns = built(), []
    inner = FakeQuantLinear.fake_quantized_weight

    def weight(layer: Any, dtype: Any = None) -> Any:
        found = inner(layer, dtype)
        learns.append(found.requires_grad)
        return found

    monkeypatch.setattr(FakeQuantLinear, "fake_quantized_weight", weight)
    probed(module, gradients=True)
    assert learns == [False] * 14  # of two blocks
    module.split(BATCH)
    assert learns[14:] == [True] * 14


def observers() -> list[Any]:
    return [
        OscillationLog(every_n_steps=2),
        SignalLog(every_n_steps=2),
        GradientLog(every_n_steps=2, probe_every_n_steps=2, full_precision_ratio=True),
    ]


def run(with_them: bool, parallel: Parallel, **trainer_args: Any) -> tuple[list[float], dict[str, Any]]:
    module, losses = make_module(parallel=parallel), []
    inner = module.training_step

    def training_step(*args: Any) -> Any:
        losses.append(inner(*args))
        return losses[-1]

    module.training_step = training_step  # type: ignore[method-assign]
    train(module, [batch(2, seed=n) for n in range(8)], callbacks=observers() if with_them else [], **trainer_args)
    return [float(loss) for loss in losses], module.split.state_dict()


@pytest.mark.parametrize(
    ("parallel", "trainer_args"),
    [
        (Parallel(), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}),
        (Parallel(checkpoint_blocks=True), {}),
        (Parallel(checkpoint_blocks="selective"), {"precision": "bf16-mixed"}),
        pytest.param(Parallel(compile_blocks=True, checkpoint_blocks="selective"), {}, marks=pytest.mark.slow),
        pytest.param(Parallel(compile_blocks=True), {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_bit_identical_with_and_without_all_observers(parallel, trainer_args) -> None:
    (losses, weights), (plain_losses, plain_weights) = (run(on, parallel, **trainer_args) for on in (True, False))
    assert losses == plain_losses
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_anew() -> None:
    from torch._dynamo.utils import counters

    graphs = []
    for on in (False, True):
        torch._dynamo.reset()
        counters.clear()
        run(on, Parallel(compile_blocks=True))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
