"""Two processes train what one process trains: learned scales, a tied head, clipping, accumulation, masked labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdqat.data import ChatTurns
from kdqat.data.loader import BlockLoader
from kdqat.losses.select import num_targets
from kdqat.models.toy import toy_tokenizer
from kdqat.student import load_student
from tests.distributed.disturb import blank
from tests.distributed.runs import (
    SEQ_LEN,
    STEPS,
    TEMPLATE,
    VAL_ROWS,
    Jobs,
    checkpoint,
    curve,
    curve_difference,
    weight_difference,
)

SAME_AS = {
    "ddp_fp32": "single_fp32",
    "fsdp2_fp32": "single_fp32",
    "ddp_bf16": "single_bf16",
    "fsdp2_bf16": "single_bf16",
    "ddp_recomputed": "single_fp32",
    "fsdp2_recomputed": "single_fp32",
}
LOSS_TOLERANCE, WEIGHT_TOLERANCE, LOGIT_TOLERANCE = 1e-5, 1e-6, 1e-4

each = pytest.mark.parametrize("name", SAME_AS)


@each
def test_two_processes_have_the_losses_and_gradient_norms_of_one(
    name: str, single: Jobs, two: Jobs, folder: Path
) -> None:
    assert single.codes(SAME_AS[name]) == [0] and two.codes(name) == [0, 0]
    assert len(curve(folder / name, "train/kl")) == STEPS
    for column in ("train/kl", "train/grad_norm"):
        difference = curve_difference(folder / name, folder / SAME_AS[name], column)
        print(f"{name} {column}: {difference:.1e}")
        assert difference < LOSS_TOLERANCE, column


@each
def test_two_processes_validate_on_the_rows_of_both(name: str, single: Jobs, two: Jobs, folder: Path) -> None:
    for column in ("val/kl", "val/perplexity"):
        difference = curve_difference(folder / name, folder / SAME_AS[name], column)
        print(f"{name} {column}: {difference:.1e}")
        assert difference < LOSS_TOLERANCE, column


@pytest.mark.parametrize("name", ["ddp_fp32", "fsdp2_fp32"])
def test_validate_in_two_processes_gives_the_numbers_of_one(name: str, single: Jobs, two: Jobs, folder: Path) -> None:
    assert two.codes(f"{name}, validated") == [0, 0]
    ours, theirs = (json.loads((folder / run / "validation.json").read_text()) for run in (name, "single_fp32"))
    assert ours.pop("student") == theirs.pop("student") == "student"
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)


@each
def test_two_processes_end_with_the_weights_and_scales_of_one(name: str, single: Jobs, two: Jobs, folder: Path) -> None:
    difference = weight_difference(folder / name, folder / SAME_AS[name])
    print(f"{name} weights: {difference:.1e}")
    assert difference < WEIGHT_TOLERANCE


@each
def test_the_student_that_two_processes_save_is_whole_and_answers_alike(
    name: str, single: Jobs, two: Jobs, folder: Path
) -> None:
    ours, theirs = load_student(folder / name / "student"), load_student(folder / SAME_AS[name] / "student")
    assert ours.model.lm_head.weight is ours.model.model.embed_tokens.weight
    assert ours.plan == theirs.plan
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        difference = float((ours.model(tokens).logits - theirs.model(tokens).logits).abs().max())
    print(f"{name} logits: {difference:.1e}")
    assert difference < LOGIT_TOLERANCE


@each
def test_checkpoints_hold_the_student_its_optimizer_and_no_teacher(name: str, two: Jobs, folder: Path) -> None:
    saved = checkpoint(folder / name)
    student = load_student(folder / name / "student")
    scales = [key for key in saved["state_dict"] if key.endswith("weight_fake_quantizer.scale")]
    assert len(scales) == len(student.layers)
    assert {key.partition(".")[0] for key in saved["state_dict"]} == {"split"}
    named = {key.removeprefix("split.model.") for key in saved["state_dict"] if "_fake_quantizer." not in key}
    assert named == {key for key in student.model.state_dict() if "_fake_quantizer." not in key}
    num_trained = len(list(student.model.parameters())) + len(scales)
    moments = saved["optimizer_states"][0]["state"].values()
    assert len(moments) == num_trained and all(moment["step"] == STEPS for moment in moments)


def test_learned_scales_and_the_tied_head_did_move(two: Jobs, folder: Path) -> None:
    early, late = (checkpoint(folder / "fsdp2_fp32", step)["state_dict"] for step in (2, STEPS))
    moved = {key for key in late if not torch.equal(early[key], late[key])}
    assert {key for key in late if key.endswith(".scale")} <= moved
    assert torch.equal(late["split.model.lm_head.weight"], late["split.model.model.embed_tokens.weight"])
    assert "split.model.lm_head.weight" in moved


def test_clipping_is_at_work_in_these_runs(single: Jobs, folder: Path) -> None:
    assert min(curve(folder / "single_fp32", "train/grad_norm").values()) > 0.05
    assert curve_difference(folder / "single_unclipped", folder / "single_fp32") > 1e-2


def test_micro_batches_of_these_runs_weigh_differently_and_some_nothing(folder: Path) -> None:
    data = ChatTurns(str(folder / "chats.jsonl"), chat_template=TEMPLATE, seq_len=SEQ_LEN, val_rows=VAL_ROWS)
    data.bind(toy_tokenizer())
    weights = []
    for rank in (0, 1):
        batches = iter(BlockLoader(data._train, batch_size=2, training=True, rank=rank, world_size=2))  # type: ignore[arg-type]
        for _ in range(2 * STEPS - 2):  # one epoch
            batch = next(batches)
            blank(batch)
            weights.append(int(num_targets(batch)))
    assert min(weights) == 0 and len(set(weights)) > 5


def test_only_the_first_process_writes_into_the_run(two: Jobs, folder: Path) -> None:
    mine, others = (
        {path for result in results.values() for path in result["written"] if path.startswith(str(folder))}
        for results in two.results
    )
    assert any(path.endswith("step=00000006.ckpt") for path in mine)
    assert not others
