"""KDQATModule: a frozen teacher and a fake-quantized student in one Lightning module.

The constructor is cheap. `build` makes the student once; `configure_model` places teacher and student and shards
them (docs/architecture.md, section on the one order). The loss is a sum; gradients are divided by what was summed over
in the *whole* optimizer step, over micro-batches and ranks, so that unequal micro-batches weigh every token alike.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from kdqat.allocate import BitAllocator
from kdqat.calibrate import Calibration
from kdqat.initializers import RTN, Initializer
from kdqat.losses import CrossEntropy, DistillLoss, ForwardKL, WeightedSum
from kdqat.models import ModelSource, SplitModel, Teacher
from kdqat.quant import QuantizerFactory, default_activation_quantizer, describe_ways
from kdqat.student import Student, load_student, prepare_student
from kdqat.training.clipping import clip_gradients
from kdqat.training.edits import edits_among
from kdqat.training.nonfinite import require_finite
from kdqat.training.optim import gradients, scale_learning_rate, scheduled
from kdqat.training.optimizer import make_optimizer, require_trainable
from kdqat.training.parallel import Parallel
from kdqat.training.side_stream import SideStream
from kdqat.training.step import HANDY_DIVISOR, StepSums, summed_over_ranks
from kdqat.training.trainable import Trainable, freeze_all_but_scales, require_source_weights, require_weights_at_rest
from kdqat.types import Batch

log = logging.getLogger(__name__)


class KDQATModule(L.LightningModule):
    """Distils a teacher into a fake-quantized student.

    Args:
        student: where the model comes from; latent weights belong in float32, or in bfloat16 with an optimizer that
            rounds stochastically (docs/optimizers.md).
        plan: which layer gets which scheme.
        quantizer: called with (spec, shape) for every weight.
        loss: of student and teacher outputs; reduction is the loss's own. None: a recipe that trains nothing.
        optimizer: called with parameter groups; None likewise.
        scheduler: called with the optimizer, stepped every optimizer step; None: a constant rate.
        teacher: None trains without one (a loss that needs it says so).
        initializer: sets the first scales.
        scale_lr_ratio: learning rate of scales and zero points, as a share of the weights'.
        parallel: checkpointing, compiling and sharding of blocks.
        activation_quantizer: of inputs, outputs and KV cache; None: MinMax for dynamic ranges, LSQPlus for static ones.
        calibration: text for static activation ranges and for initializers that need it.
        trainable: "all", or "scales": the fake quantizers' own parameters and nothing else.

    Raises:
        ValueError: for a teacher that needs weights which the initializer changes.
    """

    def __init__(
        self,
        student: ModelSource,
        plan: BitAllocator,
        quantizer: QuantizerFactory,
        loss: DistillLoss | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        teacher: Teacher | None = None,
        initializer: Initializer | None = None,
        scale_lr_ratio: float = 0.1,
        parallel: Parallel | None = None,
        activation_quantizer: QuantizerFactory | None = None,
        calibration: Calibration | None = None,
        trainable: Trainable = "all",
    ) -> None:
        super().__init__()
        self.source, self.allocator, self.quantizer, self.loss = student, plan, quantizer, loss
        self.activation_quantizer = activation_quantizer or default_activation_quantizer
        self.calibration = calibration
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.initializer = initializer if initializer is not None else RTN()
        self.scale_lr_ratio = scale_lr_ratio
        require_source_weights(teacher, self.initializer)
        self.trainable = trainable
        self._frozen: list[torch.nn.Parameter] = []  # by `trainable`, until the end
        self.parallel = parallel if parallel is not None else Parallel()
        self.teacher = teacher  # a plain object: never saved, optimized or switched to train
        self.student: Student | None = None
        self.split: SplitModel | None = None
        self._configured = False
        judges: list[DistillLoss] = [CrossEntropy()] if teacher is None else [CrossEntropy(), ForwardKL()]
        self._val_loss = WeightedSum(judges, [1.0] * len(judges))
        self._val_kl, self._val_nll = MeanMetric(), MeanMetric()
        self._step = StepSums()
        self._to_log: dict[str, Tensor] = {}
        self._side: SideStream | None = None  # the teacher's, where it has one of its own
        self._divisor: Tensor | float = HANDY_DIVISOR

    @classmethod
    def from_student(cls, student: Student, **kwargs: Any) -> Self:
        """A module around a student that exists already; further arguments as for the constructor."""
        module = cls(student=student.source, **kwargs)
        module.adopt(student)
        return module

    def require_training(self) -> None:
        """
        Raises:
            ValueError: naming the key that training needs and the recipe left out (other verbs do without), or an
                optimizer that cannot train the student's dtype.
        """
        if self.loss is None:
            raise ValueError("model.loss is missing: fit needs one to minimize, e.g. loss: {class_path: ForwardKL}")
        if self.optimizer_factory is None:
            raise ValueError(
                "model.optimizer is missing: fit needs one to train with, e.g. "
                "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4}}"
            )
        if self.source.dtype != "float32":  # asked of an optimizer of one weight, before the model is loaded
            dtype = getattr(torch, self.source.dtype)
            require_trainable(dtype, self.optimizer_factory([torch.nn.Parameter(torch.zeros(1, dtype=dtype))]))

    def adopt(self, student: Student) -> None:
        """Take `student` as the one to train."""
        self.student, self.split = student, student.split

    def build(self, saved: Path | None = None, device: torch.device | None = None) -> Student:
        """Make teacher and student, once.

        Args:
            saved: a folder written by `save_student` to start from; None: prepare from the source, on `device`.
        """
        if self.student is None:
            student = self.prepare(self.teacher, device) if saved is None else self.load(saved)
            self.adopt(student)
        assert self.student is not None and self.split is not None
        if not self.split.family.causal:
            raise ValueError(f"model {self.source.path}: only causal language models can be trained, not encoders")
        if self.teacher is not None:
            self.teacher.prepare(self.source, self.split, self.student.tokenizer, pristine=False)
        if self.trainable == "scales":
            self._frozen += freeze_all_but_scales(self.split)
        return self.student

    def prepare(self, teacher: Teacher | None = None, device: torch.device | None = None) -> Student:
        """A new student from the source, block by block on `device` (None: the CPU); `teacher` is made from the same
        load, before the plan is applied."""
        split, tokenizer = SplitModel(self.source.load_model()), self.source.load_tokenizer()
        if teacher is not None:
            teacher.prepare(self.source, split, tokenizer, pristine=True)
        return prepare_student(
            self.source,
            self.allocator,
            self.quantizer,
            self.initializer,
            activation_quantizer=self.activation_quantizer,
            calibration=self.calibration,
            split=split,
            tokenizer=tokenizer,
            device=device,
        )

    def load(self, folder: Path) -> Student:
        """A saved student whose scales this module's quantizers take as their start."""
        return load_student(folder, self.quantizer, self.activation_quantizer)

    def configure_model(self) -> None:
        root = self.trainer.strategy.root_device
        self.build(device=root if root.type == "cuda" else None)
        if self._configured:
            return
        assert self.split is not None
        for edit in edits_among(self.trainer.callbacks):  # type: ignore[attr-defined]
            assert self.student is not None
            edit.edit(self.student)
        if self.trainer.training:
            require_weights_at_rest(self.teacher, self.split)
        self.split.train()
        if self.loss is not None and "attentions" in self.loss.wants:
            self.split.use_eager_attention()
            if self.teacher is not None:
                self.teacher.use_eager_attention()
        mesh = self.device_mesh if self.trainer.strategy.__class__.__name__ == "ModelParallelStrategy" else None
        shard = self.parallel.apply(self.split, mesh)
        if self.teacher is not None:
            self.teacher.place(root, shard)
        if self.loss is not None and self.parallel.compile_blocks:
            self.loss.compile_chunks()
        if root.type == "cuda" and self.teacher is not None and not self.teacher.shares_weights and shard is None:
            self._side = SideStream(root)
        log.info(describe_ways(self.split, root))
        self._configured = True

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if self._side is None:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        with self._side.beside():  # on the main stream it would wait for the optimizer, and the teacher with it
            batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        self._side.join(batch)
        return batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Lightning drops the last step's gradients between forward and backward: as many bytes as the weights have,
        # at the moment when activations are largest
        if not self._step.micro_batches:
            self.zero_grad(set_to_none=True)

    def teardown(self, stage: str) -> None:
        if self._configured and self.split is not None and not self.parallel.shard:
            self.parallel.undo(self.split)
            self._configured = False
        self._side = None
        for parameter in self._frozen:  # the student goes on as it came
            parameter.requires_grad_(True)
        self._frozen = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.loss is not None
        assert self.split is not None
        with nullcontext() if self._side is None else self._side.beside():
            teacher = self.teacher.outputs(batch, self.loss.wants) if self.teacher is not None else None
        student = self.split(batch, self.loss.wants)
        if self._side is not None:
            self._side.join(teacher)
        parts = self.loss(student, teacher, batch)
        self._step.add(parts, batch)
        if self.trainer.accumulate_grad_batches == 1:
            # this is the whole step of this rank, so that its count is known before the backward pass
            num = summed_over_ranks(parts.num, self.trainer.world_size)
            self._divisor = num.clamp(min=1) / self.trainer.world_size
        else:
            self._divisor = HANDY_DIVISOR  # `on_after_backward` is exact
        return parts.sum / self._divisor

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        assert self.split is not None
        named = self._step.over_ranks(self.trainer.world_size)
        require_finite(float(named["loss"]), self._step, self.global_step, self.split, self.teacher)
        self._step = StepSums()
        num = named.pop("num").clamp(min=1)
        if self.trainer.accumulate_grad_batches > 1:
            # training_step divided by _divisor, Lightning by the micro-batches, DDP and FSDP2 by the ranks
            divided_by = self._divisor * self.trainer.accumulate_grad_batches * self.trainer.world_size
            torch._foreach_mul_(gradients(self.parameters()), divided_by / num)
        self._to_log = {name: value / num for name, value in named.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for name, value in self._to_log.items():  # Lightning takes its time, which the device spends on the update
            self.log(f"train/{name}", value)
        self._to_log = {}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm, str(self.trainer.precision))
        if norm is not None:
            self._to_log["grad_norm"] = norm

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.split is not None
        teacher = self.teacher.outputs(batch) if self.teacher is not None else None
        parts = self._val_loss(self.split(batch), teacher, batch)
        self._val_nll.update(parts.by_name["cross_entropy"] / parts.num, parts.num)
        if teacher is not None:
            self._val_kl.update(parts.by_name["kl"] / parts.num, parts.num)

    def on_validation_epoch_end(self) -> None:
        self.log("val/perplexity", self._val_nll.compute().exp())
        if self.teacher is not None:
            self.log("val/kl", self._val_kl.compute())
        self._val_kl.reset()
        self._val_nll.reset()

    def configure_optimizers(self) -> Any:
        self.require_training()
        assert self.split is not None and self.optimizer_factory is not None
        optimizer = make_optimizer(
            self.optimizer_factory,
            self.split,
            precision=str(self.trainer.precision),
            world_size=self.trainer.world_size,
            sharded=self.parallel.shard,
        )
        scale_learning_rate(optimizer, self.scale_lr_ratio)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = scheduled(optimizer, self.scheduler_factory, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
