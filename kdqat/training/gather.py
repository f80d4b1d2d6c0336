"""From a trained module back to a whole student on the CPU, whatever the strategy spread over ranks."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import torch

from kdqat.models import SplitModel
from kdqat.student import Student
from kdqat.student.prepare import install_plan
from kdqat.training.checkpoint import Checkpoints
from kdqat.training.edits import edits_among
from kdqat.training.module import KDQATModule


def gather_student(trainer: L.Trainer, module: KDQATModule) -> Student:
    """The trained student, whole, on the CPU, in eval mode; collective under FSDP2, so every rank must call it.

    With `Checkpoints(select="best")` it has the weights that had the best val/kl.
    """
    student, edits = module.student, edits_among(trainer.callbacks)  # type: ignore[attr-defined]
    assert student is not None and module.split is not None
    if module.parallel.shard:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(module.split, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.is_global_zero:
            split = SplitModel(module.source.load_model())
            split.vocab_size = student.split.vocab_size
            install_plan(split.model, student.plan, module.quantizer, module.activation_quantizer)
            student = replace(student, split=split)
            for edit in edits:
                edit.edit(student)
            split.load_state_dict(state)
        if module.teacher is not None:
            module.teacher.release()  # it is in pieces too, and evaluation is not collective
    else:
        student.split.cpu()
    for callback in trainer.checkpoint_callbacks:
        best = isinstance(callback, Checkpoints) and callback.select == "best" and callback.best_path(trainer)
        if best and trainer.is_global_zero:
            state = torch.load(best, weights_only=True, map_location="cpu")["state_dict"]
            prefix = "split."
            student.split.load_state_dict(
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            )
    student.split.eval()
    if trainer.is_global_zero:
        for edit in reversed(edits):  # what froze lets go before adapters are merged
            edit.finish(student)
    return student
