"""Gradient energies by role and block: where training pulls, how noisily, and how far weights move.

"Oh! We Freeze" (https://arxiv.org/abs/2403.18159) finds that the gradients of o and v projections are by far the
largest in low-bit training, and freezes these. This is the instrument for it: docs/signals.md has every formula.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from kdqat.callbacks.arguments import check_numbers
from kdqat.callbacks.observed import LayerObserver, grid_of_step, is_whole_step, offer_batch, pass_of
from kdqat.training.energies import loss_scale, signal_to_noise, weight_energies
from kdqat.training.grid import GridRows
from kdqat.training.probe import Probe, live_split, require_live
from kdqat.training.probe.passes import full_precision_energies
from kdqat.training.step import summed_over_ranks
from kdqat.types import LayerRef

log = logging.getLogger(__name__)


class GradientLog(LayerObserver):
    """Logs, before clipping: energy and energy_per_element of the weight's gradient, snr (signal-to-noise, from two
    batch sizes; needs accumulate_grad_batches of 2 or more), update_ratio (how far weights moved in one step, in grid
    steps); and from the probe, frozen layers included, probe_weight_energy and probe_activation_energy.

    Args:
        every_n_steps: optimizer steps between measurements, from step 0.
        probe_every_n_steps: the same of the probe pass; None: no probe.
        roles, blocks, layers: which layers; see `select_layers`. None: all.
        full_precision_ratio: also energies of the cross-entropy's gradient over the full-precision model's on the same
            text (ce_weight_energy_ratio): what the freeze recommender reads. One more backward pass of the probe.
        num_rows, num_tokens: of the probe's batch.
        max_rows: rows of each weight whose movement is measured; None: all.

    Raises:
        ValueError: for numbers below 1; at the start of training for a probe without a live teacher, or a selection
            that matches nothing.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 20,
        probe_every_n_steps: int | None = 20,
        roles: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        full_precision_ratio: bool = False,
        num_rows: int = 1,
        num_tokens: int = 256,
        max_rows: int | None = 64,
    ) -> None:
        check_numbers("GradientLog", every_n_steps=every_n_steps, probe_every_n_steps=probe_every_n_steps,
                      num_rows=num_rows, num_tokens=num_tokens, max_rows=max_rows)  # fmt: skip
        if full_precision_ratio and probe_every_n_steps is None:
            raise ValueError("GradientLog: full_precision_ratio is measured by the probe: set probe_every_n_steps")
        super().__init__(every_n_steps=every_n_steps, roles=roles, blocks=blocks, layers=layers,
                         probe_every_n_steps=probe_every_n_steps)  # fmt: skip
        self.probe_every_n_steps, self.full_precision_ratio = probe_every_n_steps, full_precision_ratio
        self.num_rows, self.num_tokens, self.max_rows = num_rows, num_tokens, max_rows
        self._probe_batch: Any = None
        self._first: tuple[list[LayerRef], Tensor, Tensor] | None = None  # energies of the first micro-batch, its count
        self._sized: tuple[list[LayerRef], Tensor] = [], torch.zeros(0)  # weights of each layer
        self._before: tuple[int, list[LayerRef], list[GridRows]] | None = None
        self._full: dict[str, Tensor] | None = None  # energies of the full-precision model

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        if stage != "fit" or self.probe_every_n_steps is None:
            return
        if self.full_precision_ratio or module.teacher is not None or (module.loss and module.loss.needs_teacher):
            require_live(module.teacher, "GradientLog")
        for option in ("fp8", "offload"):
            if self.full_precision_ratio and getattr(module.teacher, option, False):
                raise ValueError(
                    f"GradientLog: full_precision_ratio needs gradients in the teacher, which {option} does not give: "
                    f"leave one of the two out"
                )

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        if self.probe_every_n_steps is not None:
            probe = self._probe()
            probe.gradient_steps.add(self.probe_every_n_steps)
            probe.cross_entropy |= self.full_precision_ratio
        if trainer.accumulate_grad_batches == 1:
            log.info("GradientLog: snr needs two batch sizes; set accumulate_grad_batches to 2 or more to have it")

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.probe_every_n_steps is not None:
            offer_batch(self._probe(), self._probe_batch, trainer, batch)

    @torch.no_grad()
    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        whole = is_whole_step(trainer)
        if whole and self.probe_every_n_steps is not None and trainer.global_step % self.probe_every_n_steps == 0:
            self._note_probe(trainer, module)
        if not self._due(trainer) or trainer.accumulate_grad_batches == 1:
            return
        step, world_size, sharded = module._step, trainer.world_size, module.parallel.shard
        if whole:  # the module has yet to make a mean of the gradients
            self._total = step.over_ranks(world_size)["num"].clamp(min=1)
        elif len(step.micro_batches) == 1:
            # FSDP2 has averaged over the ranks already; DDP waits for the last micro-batch, so these are a rank's own
            ranks = world_size if sharded else 1
            num = step.over_ranks(ranks)["num"].clamp(min=1)
            refs, energies = weight_energies(self._refs, module.student.layers, ranks)
            if not refs:  # on every rank alike: all of them are frozen
                return
            divided_by = module._divisor * trainer.accumulate_grad_batches * ranks / loss_scale(trainer)
            energies = energies * (divided_by / num) ** 2
            if not sharded:
                energies = summed_over_ranks(energies, world_size) / world_size
                num = summed_over_ranks(num, world_size) / world_size
            self._first = refs, energies, num

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Optimizer) -> None:
        step, layers = trainer.global_step, module.student.layers
        if self._due(trainer):
            refs, energies = weight_energies(self._refs, layers, trainer.world_size if module.parallel.shard else 1)
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # it takes the loss scale out by itself, later
                energies = energies / loss_scale(trainer) ** 2
            self._note(step, "energy", refs, energies)
            if refs != self._sized[0]:  # layers at rest have no gradient; kept, for a copy to the device is waited for
                sizes = [float(layers[ref.name].weight.numel()) for ref in refs]
                self._sized = refs, torch.tensor(sizes).to(energies)
            self._note(step, "energy_per_element", refs, energies / self._sized[1])
            if self._first is not None and self._first[0] == refs:
                self._note(step, "snr", refs, signal_to_noise(*self._first[1:], energies, self._total))
            self._first = None
            rounded = [ref for ref in self._refs if layers[ref.name].weight_fake_quantizer is not None]
            before = grid_of_step(self._recorder, "before", module, rounded, self.max_rows)
            self._before = step, rounded, before

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if self._before is None:
            return
        (step, refs, before), self._before = self._before, None
        after = grid_of_step(self._recorder, "after", module, refs, self.max_rows)
        for old, new in zip(before, after, strict=True):
            self._note(step, "update_ratio", old.refs, old.mean((new.weights - old.weights).abs() / old.scale.abs()))

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._first = self._before = self._full = None

    def state_dict(self) -> dict[str, Any]:
        probe = self._probe() if self.probe_every_n_steps is not None and self._recorder is not None else None
        return {"probe": None if probe is None else probe.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._probe_batch = state_dict["probe"]

    def _probe(self) -> Probe:
        return self._recorder.probe(self.num_rows, self.num_tokens)

    def _note(self, step: int, metric: str, refs: Sequence[LayerRef | None], values: Tensor) -> None:
        if len(refs):
            self._recorder.add(step, "gradient", metric, refs, values)

    def _note_probe(self, trainer: L.Trainer, module: Any) -> None:
        step, seen = trainer.global_step, pass_of(self._probe(), trainer, module)
        places = {ref.name: ref for ref in self._refs}
        for metric, (names, values) in seen.loss.items():
            self._note(step, f"probe_{metric}", [places.get(name) for name in names], values)
        if self.full_precision_ratio:
            full = self._full_precision(trainer, module, list(seen.student.inputs))
            names, values = seen.cross_entropy["weight_energy"]
            if names:  # a plan of embeddings alone has no layer that the probe sees
                ratio = values / torch.stack([full.get(name, torch.full_like(values[0], math.nan)) for name in names])
                asked = [places.get(name) if name in full else None for name in names]
                self._note(step, "ce_weight_energy_ratio", asked, ratio)

    def _full_precision(self, trainer: L.Trainer, module: Any, names: list[str]) -> dict[str, Tensor]:
        """Energies of the teacher's own gradient, which stays what it is: measured once."""
        if self._full is None:
            batch, split = self._probe().batch, live_split(module.teacher, "GradientLog")
            assert batch is not None
            there = dict(split.model.named_modules())
            # a teacher with weights of its own computes in their dtype, as in `Teacher.outputs`
            context = trainer.precision_plugin.forward_context if module.teacher.shares_weights else nullcontext
            energies = full_precision_energies(split, batch, [name for name in names if name in there], context)
            self._full = dict(zip(*energies["weight_energy"], strict=True))
        return self._full
