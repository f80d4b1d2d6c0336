"""The verbs as functions: quantize, cache, fit, evaluate, signals, export. The command line adds a run directory.

student = kdqat.quantize("toy:llama", "W4A16_G32")
student = kdqat.fit(student, data=kdqat.PythonDocs(seq_len=128), loss=kdqat.ForwardKL(), steps=50)
print(kdqat.evaluate(student, [kdqat.TeacherAgreement("python_docs:heldout")]))
kdqat.export(student, kdqat.DequantizedHF(), "out/")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kdqat.allocate import BitAllocator, Uniform
from kdqat.calibrate import Calibration
from kdqat.callbacks import ProgressLine, StopOnSignal, missing_guards
from kdqat.data import TextData
from kdqat.evaluators import Evaluator
from kdqat.exporters.write import export as export  # likewise
from kdqat.exporters.write import require_exportable as require_exportable
from kdqat.initializers import Initializer, MSEGrid
from kdqat.losses import DistillLoss, ForwardKL
from kdqat.models import CachedTeacher, FrozenTeacher, ModelSource, Teacher
from kdqat.quant import LSQ, QuantizerFactory
from kdqat.spec import LayerScheme
from kdqat.student import Student, prepare_student
from kdqat.training import Checkpoints, CSVMetrics, KDQATModule, WarmupCosine, WholeFileIO
from kdqat.training.edits import Observer, in_order
from kdqat.training.fill import fill_cache
from kdqat.training.gather import gather_student
from kdqat.training.measure import signals as signals  # what a verb is, and too long for here
from kdqat.training.planner import MemoryPlan
from kdqat.training.planner import plan_memory as _plan_memory
from kdqat.training.signals import SignalRecorder
from kdqat.training.trainable import Trainable

log = logging.getLogger(__name__)


def quantize(
    model: str | ModelSource,
    scheme: str | LayerScheme | BitAllocator,
    *,
    quantizer: QuantizerFactory = LSQ,
    initializer: Initializer | None = None,
    activation_quantizer: QuantizerFactory | None = None,
    calibration: Calibration | None = None,
    device: str | torch.device | None = None,
) -> Student:
    """A fake-quantized student, ready to train, evaluate or export.

    Args:
        model: where it comes from; see ModelSource.path.
        scheme: a preset, a scheme for every layer but lm_head, or an allocator.
        quantizer: of the weights.
        initializer: of the scales; default MSEGrid.
        activation_quantizer: None: MinMax for dynamic ranges, LSQPlus for static ones.
        calibration: text for static activation ranges and for initializers that need it.
        device: where each block is calibrated and initialized in its turn, as "cuda"; None: the CPU.

    Raises:
        ValueError: if the model cannot be had or the plan does not fit it.
    """
    source = ModelSource(model) if isinstance(model, str) else model
    allocator = scheme if isinstance(scheme, BitAllocator) else Uniform(scheme)
    return prepare_student(
        source,
        allocator,
        quantizer,
        initializer if initializer is not None else MSEGrid(),
        activation_quantizer=activation_quantizer,
        calibration=calibration,
        device=device,
    )


def cache(
    model: str | ModelSource,
    teacher: CachedTeacher,
    data: TextData,
    *,
    device: str | torch.device = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Let `teacher` answer every row of `data` beforehand; rows it has answered are passed over.

    Args:
        model: the student's, as for `quantize`.
        device: where the live teacher computes.
        stop: asked after every batch whether to leave the rest for the next call.

    Returns:
        How many rows are missing still: 0 unless `stop` said so.

    Raises:
        ValueError: if the answers do not fit on the disk, or their folder holds another teacher's.
    """
    source = ModelSource(model) if isinstance(model, str) else model
    return fill_cache(source, teacher, data, device=torch.device(device), stop=stop)


def fit(
    student: Student,
    *,
    data: TextData,
    loss: DistillLoss | None = None,
    steps: int = 100,
    teacher: Teacher | None = None,
    optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
    callbacks: Sequence[L.Callback] = (),
    out_dir: str | Path | None = None,
    trainable: Trainable = "all",
    **trainer_args: Any,
) -> Student:
    """Train `student` in place against `teacher`; returns it.

    Args:
        data: what to train on.
        loss: default ForwardKL.
        steps: optimizer steps, under a cosine schedule.
        teacher: default: the student's source, frozen, in float32.
        optimizer: called with parameter groups; default AdamW at 1e-4 without weight decay.
        callbacks: besides progress, guards and stop-on-signal.
        out_dir: run directory for metrics and checkpoints; None writes nothing.
        trainable: "scales" leaves the latent weights as they are, as a SharedTeacher needs.
        trainer_args: for lightning.Trainer, e.g. precision="bf16-mixed".
    """
    module = KDQATModule.from_student(
        student,
        plan=Uniform("W4A16"),  # not asked: the student has its plan
        quantizer=LSQ,
        loss=loss if loss is not None else ForwardKL(),
        optimizer=optimizer or partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
        scheduler=WarmupCosine,
        teacher=teacher if teacher is not None else FrozenTeacher(dtype="float32"),
        trainable=trainable,
    )
    bind_data(data, student)
    require_answers(module, data)
    args = {"max_steps": steps, "accelerator": "auto", "devices": 1, **trainer_args}
    trainer = make_trainer(args, None if out_dir is None else Path(out_dir), callbacks)
    trainer.fit(module, datamodule=data, weights_only=True)
    return gather_student(trainer, module)


def plan_memory(module: KDQATModule, data: TextData, trainer_args: dict[str, Any]) -> MemoryPlan:
    """Memory and time that training will take, without loading a weight (docs/memory.md).

    Args:
        trainer_args: as of a recipe's trainer section.

    Raises:
        ValueError: for what training would refuse as well, or what cannot be planned.
    """
    return _plan_memory(module, data, trainer_args)


def bind_data(data: TextData, student: Student) -> None:
    """Give `data` the student's tokenizer and check that its rows fit the model's positions."""
    data.bind(student.tokenizer, getattr(student.model.config, "max_position_embeddings", None))


def require_answers(module: KDQATModule, data: TextData) -> None:
    """Check that the module's teacher will have an answer to every row of `data`, which is bound.

    Raises:
        ValueError: if it will not, before anything is trained.
    """
    if module.teacher is not None:
        module.build()
        module.teacher.require_answers(data.row_keys, module.loss.wants if module.loss is not None else frozenset())


def make_trainer(args: dict[str, Any], run: Path | None, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """A Trainer as kdqat needs it, with what the recipe says on top.

    Args:
        args: Trainer arguments of the recipe.
        run: run directory; None: no checkpoints and no logs.
        callbacks: in addition to those in `args`.

    Raises:
        ValueError: for arguments that Lightning refuses, such as an accelerator this machine does not have.
    """
    # null means "not given", but for this key, where it means: validate every so many batches, whatever the epoch
    args = {key: value for key, value in args.items() if value is not None or key == "check_val_every_n_epoch"}
    mine = [*_listed(args.pop("callbacks", None)), *callbacks]
    mine += [ProgressLine()] if args.pop("enable_progress_bar", True) and not _has(mine, ProgressLine) else []
    mine += missing_guards(mine)
    if run is not None:
        mine += [] if _has(mine, Checkpoints) else [Checkpoints()]
        args.setdefault("logger", [TensorBoardLogger(str(run), name="tensorboard", version=""), CSVMetrics(str(run))])
    else:
        args = {"logger": False, "enable_checkpointing": False, **args}
    mine += [SignalRecorder(run)] if _has(mine, Observer) and not _has(mine, SignalRecorder) else []
    args.setdefault("log_every_n_steps", 10 if args.get("max_steps", -1) > 100 else 1)
    args.setdefault("num_sanity_val_steps", 0)
    args |= {
        "default_root_dir": run,
        "callbacks": [*in_order(mine), StopOnSignal()],
        "plugins": [*_listed(args.get("plugins")), WholeFileIO()],
        "use_distributed_sampler": False,  # the loaders know their rank
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    try:
        return L.Trainer(**args)
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error


def evaluate(
    student: Student,
    evaluators: Sequence[Evaluator],
    teacher: Teacher | None = None,
    *,
    device: str | torch.device = "cpu",
    name: str = "student",
) -> dict[str, dict[str, float]]:
    """Numbers of every evaluator, by its label.

    Args:
        teacher: default: the student's source, frozen, in float32. Its `judge()` answers; where that is somebody
            else, it is let go afterwards.
        device: where teacher and student compute.
        name: of the student, for the progress line.

    Raises:
        ValueError: if two evaluators have the same label.
    """
    labels = [evaluator.label for evaluator in evaluators]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"evaluate: two evaluators are called {label!r}; give one of them a label")
    teacher = teacher if teacher is not None else FrozenTeacher(dtype="float32")
    judge = teacher.judge()
    judge.prepare(student.source, student.split, student.tokenizer, pristine=False)
    judge.place(torch.device(device))
    training = student.split.training
    student.split.to(device).eval()
    results = {}
    try:
        for evaluator in evaluators:
            log.info("evaluating %s on %s", name, evaluator.label)
            results[evaluator.label] = evaluator.evaluate(student, judge)
    finally:
        student.split.train(training)
        if judge is not teacher:
            judge.release()
    return results


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _has(callbacks: Sequence[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
