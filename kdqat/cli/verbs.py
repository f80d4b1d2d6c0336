"""What each verb does in a run directory. The work itself is in `kdqat.api` and below."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
from rich.console import Console

from kdqat import api
from kdqat.callbacks import StopOnSignal
from kdqat.cli.allocation import write_allocation
from kdqat.cli.cache import cache
from kdqat.cli.export import export, require_exportable, write_exports
from kdqat.cli.parser import Recipe, parse_recipe
from kdqat.cli.score import score
from kdqat.cli.session import (
    begin,
    compare,
    console,
    device_of,
    first_process,
    measure_rtn,
    quiet,
    run_of,
    save,
    start,
    student_folder,
    teacher_of,
)
from kdqat.cli.signals import signals
from kdqat.student import load_student
from kdqat.training import newest_complete
from kdqat.training.edits import edits_among
from kdqat.training.gather import gather_student
from kdqat.training.planner import describe, print_plan
from kdqat.training.planner.student import meta_student
from kdqat.training.trainable import require_rest

__all__ = ["cache", "eval", "export", "fit", "generate", "quantize", "score", "signals", "validate"]


def quantize(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prepare a student and save it to prepared/."""
    recipe = begin("quantize", options, overrides)
    student = recipe.model.prepare(device=device_of(recipe.trainer.get("accelerator")))
    start("quantize", recipe, options)
    save(student, recipe.run.prepared)
    write_allocation(recipe, student)
    console.print(f"prepared student: {recipe.run.prepared}")


def fit(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train, save student/, then run the recipe's evaluate and export sections."""
    if options.dry_run:
        return dry_run(options, overrides)
    recipe = begin("fit", options, overrides, resume=options.resume)
    if recipe.data is None:
        raise ValueError(f"{options.recipe}: fit needs a data section (docs/recipes.md)")
    recipe.model.require_training()
    checkpoint = newest_complete(recipe.run.checkpoints) if options.resume else None
    overwrite = options.overwrite or options.resume  # what the interrupted run wrote after its training
    trainer = api.make_trainer(recipe.trainer, recipe.run.path)
    require_rest(recipe.model.teacher, recipe.model.trainable, edits_among(trainer.callbacks))  # type: ignore[attr-defined]
    prepared = recipe.run.prepared if recipe.run.prepared.is_dir() else None
    if prepared is None:  # now, not after a method that takes hours
        _require_matches(recipe, trainer.callbacks)  # type: ignore[attr-defined]
    student = recipe.model.build(prepared, device_of(recipe.trainer.get("accelerator")))
    if prepared is not None:  # the plan is the one that lies there
        _require_matches(recipe, trainer.callbacks)  # type: ignore[attr-defined]
    # now, not after hours of training
    require_exportable(student, recipe.exporters, recipe.run.export, overwrite=overwrite)
    api.bind_data(recipe.data, student)
    api.require_answers(recipe.model, recipe.data)
    start("fit", recipe, options)
    if first_process():
        if not recipe.run.prepared.is_dir():  # else `quantize` has written what the plan was made from
            write_allocation(recipe, student)
        _announce(recipe)
    if recipe.evaluators and first_process():
        # a method that rewrites weights has quantized them already: RTN is of the source's
        measure_rtn(recipe, None if recipe.model.initializer.rewrites_weights else student)
    try:
        trainer.fit(recipe.model, datamodule=recipe.data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # what Lightning makes of the second Ctrl-C
        raise KeyboardInterrupt from None
    stopped = next(c.received for c in trainer.callbacks if isinstance(c, StopOnSignal))  # type: ignore[attr-defined]
    if stopped:
        if not trainer.is_global_zero:
            return 0  # Lightning kills the first process when another one fails before it
        console.print(f"stopped at step {trainer.global_step}, saved; `kdqat fit {recipe.run.path} --resume` goes on")
        return 128 + stopped
    student = gather_student(trainer, recipe.model)
    if not trainer.is_global_zero:
        return 0
    save(student, recipe.run.student)
    console.print(f"trained student: {recipe.run.student}")
    if recipe.evaluators:
        compare(recipe, student, recipe.run.student)
    write_exports(student, recipe.exporters, recipe.run.export, recipe.run, options)
    return 0


def dry_run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print what `fit` would take; no weight is loaded and the run directory is not touched."""
    quiet()
    recipe = parse_recipe(options.recipe, overrides)
    if recipe.data is None:
        raise ValueError(f"{options.recipe}: fit needs a data section (docs/recipes.md)")
    print_plan(api.plan_memory(recipe.model, recipe.data, recipe.trainer), Console(highlight=False))
    return 0


def validate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """KL and perplexity on the validation rows of the recipe's data, into validation.json."""
    recipe = begin("validate", options, overrides)
    if recipe.data is None:
        raise ValueError(f"{options.recipe}: validate needs a data section (docs/recipes.md)")
    folder = student_folder(recipe.run)
    recipe.model.teacher = recipe.model.teacher and teacher_of(recipe)
    student = recipe.model.build(folder)
    api.bind_data(recipe.data, student)
    api.require_answers(recipe.model, recipe.data)
    trainer = api.make_trainer({**recipe.trainer, "callbacks": None}, None)
    numbers: dict[str, float] = {}
    for results in trainer.validate(recipe.model, datamodule=recipe.data, verbose=False):
        numbers.update(results)
    if trainer.is_global_zero:
        start("validate", recipe, options)
        recipe.run.write_json("validation.json", {"student": folder.name, **numbers})
        console.print("  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))


def eval(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run the recipe's evaluators on teacher, RTN and student, into eval.json."""
    recipe = begin("eval", options, overrides)
    if not recipe.evaluators:
        raise ValueError(f"{options.recipe}: eval needs an evaluate section (docs/recipes.md)")
    folder = student_folder(recipe.run)
    student = load_student(folder)
    measure_rtn(recipe, None)
    start("eval", recipe, options)
    compare(recipe, student, folder)


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Let the student of a run continue a prompt, greedily."""
    if overrides:
        raise ValueError(f"unknown argument {overrides[0]!r}")
    quiet()
    if options.max_new_tokens < 1:
        raise ValueError("--max_new_tokens must be at least 1")
    student = load_student(student_folder(run_of(options.recipe)))
    if not student.split.has_head:
        raise ValueError(f"{options.recipe}: this encoder has no language-model head, so it generates no text")
    device = device_of("auto")
    model = student.model.to(device)
    if options.chat:
        if not student.tokenizer.chat_template:
            raise ValueError("--chat: the tokenizer has no chat template; leave --chat out")
        turns = [{"role": "user", "content": options.prompt}]
        inputs = student.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = student.tokenizer(options.prompt, return_tensors="pt")
    inputs = {key: value.to(device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    pad = (
        student.tokenizer.pad_token_id if student.tokenizer.pad_token_id is not None else student.tokenizer.eos_token_id
    )
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=pad)[0]
    if options.chat:
        tokens = tokens[inputs["input_ids"].shape[1] :]
    print(student.tokenizer.decode(tokens, skip_special_tokens=True))


def _require_matches(recipe: Recipe, callbacks: Sequence[L.Callback]) -> None:
    """Let callbacks find the layers that they choose, in the student's shapes.

    Raises:
        ValueError: for a selection that matches nothing, and whatever preparing the student would refuse.
    """
    try:
        meta_student(recipe.model, callbacks)
    except ValueError:
        raise
    except Exception as error:  # a model without shapes on the meta device: training finds what is wrong
        console.print(f"which layers callbacks choose is found at the start of training ({error})")


def _announce(recipe: Recipe) -> None:
    """What the run will take, in a line; it goes on where that cannot be said."""
    assert recipe.data is not None
    try:
        describe(api.plan_memory(recipe.model, recipe.data, recipe.trainer), console)
    except Exception as error:  # a plan that fails must not stop the run it is about
        console.print(f"memory: no plan ({error})")
