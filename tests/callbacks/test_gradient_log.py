"""GradientLog's numbers against gradients and weights that another callback saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from kdqat.allocate import Uniform
from kdqat.callbacks import GradientLog, LoraAdapters
from kdqat.training.edits import Observer
from kdqat.training.energies import loss_scale, signal_to_noise, weight_energies
from kdqat.training.signals import SignalRecorder
from kdqat.types import LayerRef
from tests.training.toy import batch, joined, make_module, train

BATCHES = [batch(2, labelled=n + 2, seed=n) for n in range(4)]


class Witness(Observer):
    """What gradients and weights are as the optimizer begins, and the weights afterwards."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Any]] = []
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        layers = module.student.layers
        self.gradients.append({name: layer.weight.grad.clone() for name, layer in layers.items()})
        self.before.append({n: (x.weight.detach().clone(), x.weight_fake_quantizer.scale.detach().clone())
                            for n, x in layers.items()})  # fmt: skip

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.after.append({name: layer.weight.detach().clone() for name, layer in module.student.layers.items()})


def logged(log: GradientLog, batches: Any = BATCHES, **args: Any) -> tuple[dict[Any, float], Witness]:
    witness, module = Witness(), make_module()
    trainer = train(module, batches, callbacks=[log, witness], **args)
    (recorder,) = (c for c in trainer.callbacks if isinstance(c, SignalRecorder))
    table = recorder.table().to_pylist()
    return {(row["step"], row["metric"], row["layer"]): row["value"] for row in table}, witness


@pytest.mark.parametrize("accumulate", [1, 2])
def test_energies_are_squared_norms_before_clipping(accumulate: int) -> None:
    log = GradientLog(every_n_steps=1, probe_every_n_steps=None)
    values, witness = logged(log, accumulate_grad_batches=accumulate, gradient_clip_val=1e-4)
    assert len(witness.gradients) == 4 // accumulate
    for step, gradients in enumerate(witness.gradients):
        for name, gradient in gradients.items():
            assert values[step, "energy", name] == pytest.approx(float(gradient.double().square().sum()), rel=1e-5)
            mean = float(gradient.double().square().mean())
            assert values[step, "energy_per_element", name] == pytest.approx(mean, rel=1e-5)


def test_signal_to_noise_follows_from_the_mean_gradients_of_one_micro_batch_and_of_the_step() -> None:
    values, _ = logged(GradientLog(every_n_steps=1, probe_every_n_steps=None), accumulate_grad_batches=4)
    assert set(name for _, name, _ in values) == {"energy", "energy_per_element", "snr", "update_ratio"}
    one, all_of_them = logged(GradientLog(every_n_steps=1, probe_every_n_steps=None), BATCHES[:1])[1], joined(BATCHES)
    whole = logged(GradientLog(every_n_steps=1, probe_every_n_steps=None), [all_of_them])[1]
    b, B = (float((x.labels[:, 1:] != -100).sum()) for x in (BATCHES[0], all_of_them))
    for name, gradient in whole.gradients[0].items():
        small, large = (float(g.double().square().sum()) for g in (one.gradients[0][name], gradient))
        signal, noise = (B * large - b * small) / (B - b), (small - large) / (1 / b - 1 / B)
        assert values[0, "snr", name] == pytest.approx(signal * B / noise, rel=1e-3)


def test_the_two_batch_sizes_give_signal_and_noise_of_what_they_are_made_of() -> None:
    small, large = torch.tensor([2.0 + 6.0 / 3]), torch.tensor([2.0 + 6.0 / 12])  # |G|^2 = 2, S = 6
    ratio = signal_to_noise(small, torch.tensor(3.0), large, torch.tensor(12.0))
    assert float(ratio) == pytest.approx(2.0 * 12 / 6)


def test_the_update_ratio_is_the_mean_movement_in_grid_steps() -> None:
    values, witness = logged(GradientLog(every_n_steps=2, probe_every_n_steps=None, max_rows=None))
    assert {step for step, *_ in values} == {0, 2}
    for step in (0, 2):
        for name, (weight, scale) in witness.before[step].items():
            moved = (witness.after[step][name] - weight).abs().view(*scale.shape[:2], -1) / scale
            assert values[step, "update_ratio", name] == pytest.approx(float(moved.mean()), rel=1e-4)


def test_the_update_ratio_sees_what_an_adapter_inside_moves() -> None:
    log, module = GradientLog(every_n_steps=1, probe_every_n_steps=None), make_module()
    trainer = train(module, BATCHES[:2], callbacks=[LoraAdapters(rank=4), log])
    (recorder,) = (c for c in trainer.callbacks if isinstance(c, SignalRecorder))
    ratios = [row["value"] for row in recorder.table().to_pylist() if row["metric"] == "update_ratio"]
    adapted = len(module.student.adapters)
    assert adapted == 14 and sum(ratio > 0 for ratio in ratios) == 2 * adapted


def test_some_rows_stand_for_all_evenly() -> None:
    all_rows, _ = logged(GradientLog(probe_every_n_steps=None, max_rows=None))
    some, _ = logged(GradientLog(probe_every_n_steps=None, max_rows=16))
    for key, value in some.items():
        assert value == pytest.approx(all_rows[key], rel=0.3)


def test_a_selection_logs_only_what_it_names_and_a_typo_is_an_error() -> None:
    values, _ = logged(GradientLog(every_n_steps=2, probe_every_n_steps=2, roles=["o", "v"], blocks=[-1]))
    assert {layer for *_, layer in values} == {f"model.layers.1.self_attn.{name}_proj" for name in "ov"}
    assert {metric for _, metric, _ in values} >= {"probe_weight_energy", "probe_activation_energy"}
    with pytest.raises(ValueError, match="GradientLog: roles 'ov' matches no layer"):
        logged(GradientLog(roles=["ov"]))


@pytest.mark.parametrize(("planned", "roles"), [([], None), (["q"], ["lm_head"])])
def test_a_probe_that_sees_none_of_the_layers_logs_nothing_of_them(planned: list[str], roles: list[str] | None) -> None:
    rest = [role for role in ("q", "k", "v", "o", "gate", "up", "down") if role not in planned]
    module = make_module(plan=Uniform("W4A16_G32", ignore=rest, embeddings="W4A16_G32"))
    log = GradientLog(every_n_steps=1, full_precision_ratio=True, roles=roles)
    trainer = train(module, BATCHES[:1], callbacks=[log])
    (recorder,) = (c for c in trainer.callbacks if isinstance(c, SignalRecorder))
    assert set(recorder.table()["metric"].to_pylist()) == {"energy", "energy_per_element", "update_ratio"}


def test_no_gradient_is_no_energy_on_the_device_of_the_weights() -> None:
    layer = SimpleNamespace(weight=torch.nn.Parameter(torch.zeros(2, device="meta")))
    refs, energies = weight_energies([LayerRef("a", 0, "o", ())], {"a": layer}, 1)
    assert refs == [] and energies.shape == (0,) and energies.device.type == "meta"


def test_frozen_weights_have_no_signal_to_noise() -> None:
    log, module = GradientLog(every_n_steps=1, probe_every_n_steps=None), make_module()
    trainer = train(module, BATCHES, callbacks=[LoraAdapters(rank=4), log], accumulate_grad_batches=2)
    (recorder,) = (c for c in trainer.callbacks if isinstance(c, SignalRecorder))
    assert set(recorder.table()["metric"].to_pylist()) == {"update_ratio"}


def test_the_ratio_to_the_full_precision_model_is_one_where_nothing_is_rounded() -> None:
    module = make_module()
    module.build()
    for layer in module.student.layers.values():
        layer.fake_quantize = False
    trainer = train(module, BATCHES[:1], callbacks=[GradientLog(full_precision_ratio=True)])
    (recorder,) = (c for c in trainer.callbacks if isinstance(c, SignalRecorder))
    ratios = [row["value"] for row in recorder.table().to_pylist() if row["metric"] == "ce_weight_energy_ratio"]
    assert len(ratios) == 14 and ratios == pytest.approx([1.0] * 14, rel=1e-4)


def test_the_loss_scale_of_fp16_is_divided_out() -> None:
    numbers = []
    for precision in (None, MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        log = GradientLog(every_n_steps=1, num_tokens=8)
        plugins = {} if precision is None else {"plugins": [precision]}
        values, _ = logged(log, accumulate_grad_batches=4, **plugins)
        numbers.append({key: value for key, value in values.items() if "down" in key[2] and key[1] != "update_ratio"})
    assert {metric for _, metric, _ in numbers[0]} >= {"energy", "snr", "probe_weight_energy"}
    for key, value in numbers[0].items():
        assert numbers[1][key] == pytest.approx(value, rel=0.1), key


def test_the_loss_scale_is_that_of_fp16_only() -> None:
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=SimpleNamespace(_scale=torch.tensor(8.0))))
    assert float(loss_scale(scaled)) == 8 and loss_scale(SimpleNamespace(precision_plugin=object())) == 1


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"num_tokens": 0}, {"probe_every_n_steps": -1}])
def test_numbers_below_one_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"GradientLog: {next(iter(arguments))} must be at least 1"):
        GradientLog(**arguments)
