"""Looking again: whom the probe asks anew, what it keeps, and what it waits for."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from kdqat.callbacks import GradientLog, SignalLog
from kdqat.models import FrozenTeacher, SharedTeacher, SplitModel
from kdqat.training.probe import Probe, cut
from kdqat.training.probe.passes import probed_layers
from kdqat.training.probe.probe import _repeats_itself
from kdqat.training.signals import recorder_of
from kdqat.training.tables import signal_values
from tests.models.waits import Waits
from tests.training.toy import batch, built, make_module, train

BATCH = batch(2, seed=5)


class Counting:
    """A teacher that counts how often it answers the probe's batch, which is shorter than the training's."""

    asked = 0

    def outputs(self, batch: Any, *wants: Any) -> Any:
        self.asked += batch.input_ids.shape[1] == 8
        return super().outputs(batch, *wants)  # type: ignore[misc]


class Frozen(Counting, FrozenTeacher):
    repeats_itself = True


class Doubtful(Frozen):
    repeats_itself = False


class Shared(Counting, SharedTeacher):
    pass


def signals_of(teacher: Any, **changes: Any) -> list[dict[str, Any]]:
    """Of a probe of 8 tokens at steps 0, 2 and 4."""
    shared = [
        SignalLog(every_n_steps=2, num_tokens=8),
        GradientLog(every_n_steps=2, probe_every_n_steps=2, num_tokens=8, full_precision_ratio=True),
    ]
    module = make_module(teacher=teacher, **changes)
    trainer = train(module, [batch(2, seed=n) for n in range(5)], callbacks=shared)
    return recorder_of(trainer, "").table().to_pylist()


def test_a_frozen_teacher_is_asked_about_the_probe_once_and_others_each_time() -> None:
    once, always, moving = Frozen(), Doubtful(), Shared()
    assert signals_of(once) == signals_of(always) != []
    signals_of(moving, trainable="scales")
    assert (once.asked, always.asked, moving.asked) == (1, 3, 3)


def test_another_batch_is_another_question() -> None:
    probe, teacher = Probe(2, 8), Frozen()
    module = built(teacher=teacher)
    layers = probed_layers(module.split, module.student.refs, module.student.layers)
    passes = []
    for step, text in ((0, batch(2, seed=5)), (1, None), (2, batch(2, seed=6))):
        if text is not None:
            probe.take(list(cut(text, 2, 8)[:5]))
        passes.append(probe.at(step, module.split, lambda: layers, teacher=teacher, loss=None, context=nullcontext))
    first, again, other = (one.answered.outputs.hidden for one in passes)
    assert first is again and teacher.asked == 2 and not torch.equal(first, other)
    assert not probe._answered[1].seen.outputs  # kept only for who compares
    probe.let_go()
    assert probe._answered is None and probe.batch is not None


def test_who_answers_in_a_way_of_its_own_is_asked_anew_unless_it_says_otherwise() -> None:
    class Moving(FrozenTeacher):
        def outputs(self, *args: Any) -> Any:
            return super().outputs(*args)

    class Sharded(FSDPModule, SplitModel):
        pass

    kinds = {kind: kind() for kind in (FrozenTeacher, Frozen, Doubtful, Moving, SharedTeacher)}
    for teacher in kinds.values():
        teacher.split = built().split
    told = {kind.__name__: _repeats_itself(teacher) for kind, teacher in kinds.items()}
    assert told == {"FrozenTeacher": True, "Frozen": True, "Doubtful": False, "Moving": False, "SharedTeacher": False}
    kinds[FrozenTeacher].split.__class__ = Sharded
    assert not _repeats_itself(kinds[FrozenTeacher]) and not _repeats_itself(None)


def test_a_look_that_fails_leaves_the_garbage_collector_as_it_was() -> None:
    probe = Probe(2, 8)
    probe.take(list(cut(BATCH, 2, 8)[:5]))
    with pytest.raises(ZeroDivisionError):
        probe.at(0, None, lambda: 1 / 0, teacher=None, loss=None, context=nullcontext)  # type: ignore[arg-type]
    assert gc.isenabled()


@pytest.mark.parametrize("padded", [False, True])
def test_a_second_look_waits_for_nothing(padded: bool) -> None:
    module, probe = built(), Probe(2, 8)
    mask = torch.ones_like(BATCH.input_ids).index_fill_(1, torch.arange(6, 8), 0) if padded else None
    probe.attention, layers = True, probed_layers(module.split, module.student.refs, module.student.layers)
    probe.gradient_steps.add(1)
    probe.compares = True
    probe.offer(BATCH._replace(attention_mask=mask), lambda state: state)
    counts = []
    for step in range(3):
        with Waits() as waits:
            seen = probe.at(step, module.split, lambda: layers, teacher=module.teacher, loss=module.loss,
                            context=nullcontext)  # fmt: skip
        with Waits() as ours:
            values = list(signal_values(seen, probe.positions, {}))
        counts.append(waits.count + ours.count)
        assert ours.count == 0 and values and seen.loss
    probe.forget()
    assert padded or counts == [0, 0, 0]  # of a padded row transformers reads where it begins
