"""A cached teacher answers what the live one would, and nothing else, and says so before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kdqat.losses import ForwardKL
from kdqat.models import CachedTeacher, FrozenTeacher, ModelSource, SplitModel
from kdqat.models.top_k import as_outputs, top_k_of
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.types import Batch, Outputs, TopKOutputs
from tests.models.cached import SOURCE, cached, fill, rows

INDEX = torch.tensor([4, 1, 2])  # another order, and another batch


def live(batch: Batch, dtype: str = "float32", source: ModelSource = SOURCE) -> Outputs:
    teacher = FrozenTeacher(dtype=dtype)
    teacher.prepare(source, SplitModel(source.load_model()), toy_tokenizer(), pristine=True)
    return teacher.outputs(batch)


def dense(answer: TopKOutputs, size: int) -> torch.Tensor:
    """Log-probabilities [B, T, V], -inf outside of the k."""
    empty = torch.full((*answer.ids.shape[:2], size), -torch.inf)
    return empty.scatter(-1, answer.ids, answer.log_probs)


@pytest.mark.parametrize("kind", ["toy:llama", "toy:gemma2", "toy:cohere", "toy:phi", "toy:opt"])
def test_hidden_states_and_the_head_alone_give_the_live_teachers_loss_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source, data = ModelSource(kind), rows()
    fill(cached(tmp_path, source=source, kind="hidden"), data, source=source)
    batch, student = data.batch(torch.tensor([0, 1, 2])), SplitModel(ModelSource(kind).load_model())
    with torch.no_grad():
        student.model.get_input_embeddings().weight.mul_(1.5)  # type: ignore[operator]
    teacher = cached(tmp_path, source=source, kind="hidden")
    losses = [ForwardKL()(student(batch), t, batch).sum for t in (live(batch, source=source), teacher.outputs(batch))]
    assert losses[0] > 1e-4 and torch.equal(*losses)
    assert teacher.teacher.split is None  # nobody loaded the model


def test_only_the_head_is_in_memory(tmp_path: Path) -> None:
    fill(cached(tmp_path, kind="hidden"), rows())
    teacher = cached(tmp_path, kind="hidden")
    assert teacher.split is not None
    real = [name for name, p in teacher.split.named_parameters(remove_duplicate=False) if not p.is_meta]
    assert real == ["model.lm_head.weight"] and not any(p.requires_grad for p in teacher.split.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_kept_in_the_teachers_own_type(dtype: str, tmp_path: Path) -> None:
    data = rows()
    fill(cached(tmp_path, kind="hidden", dtype=dtype), data)
    batch = data.batch(torch.tensor([0, 1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        answer = cached(tmp_path, kind="hidden", dtype=dtype).outputs(batch)
    assert isinstance(answer, Outputs) and answer.hidden.dtype == getattr(torch, dtype)
    assert torch.equal(answer.hidden, live(batch, dtype).hidden)


def test_the_top_k_of_all_tokens_is_the_live_teachers_distribution(tmp_path: Path) -> None:
    data = rows()
    fill(cached(tmp_path, k=260), data)
    answer = cached(tmp_path, k=260).outputs(data.batch(INDEX))
    assert isinstance(answer, TopKOutputs) and answer.ids.dtype == torch.int64 and answer.extras == {}
    reference = live(data.batch(INDEX))
    expected = reference.head(reference.hidden).log_softmax(-1)
    torch.testing.assert_close(dense(answer, 260), expected, rtol=2**-10, atol=1e-6)
    assert bool((answer.log_tail == -torch.inf).all())


def test_the_k_likeliest_and_the_probability_of_the_others_sum_to_one(tmp_path: Path) -> None:
    data = rows()
    fill(cached(tmp_path), data)
    answer = cached(tmp_path).outputs(data.batch(INDEX))
    assert isinstance(answer, TopKOutputs) and answer.ids.shape == (3, 12, 8)
    torch.testing.assert_close(answer.log_probs.exp().sum(-1) + answer.log_tail.exp(), torch.ones(3, 12))
    reference = live(data.batch(INDEX))
    expected = reference.head(reference.hidden).log_softmax(-1).topk(8)
    assert torch.equal(answer.ids, expected.indices)
    torch.testing.assert_close(answer.log_tail.exp(), 1 - expected.values.exp().sum(-1), rtol=1e-3, atol=0)


def test_a_tail_too_small_for_a_subtraction_is_kept_and_chunks_leave_no_seam() -> None:
    logits = torch.randn(2, 700, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 0] += 40.0
    stored = top_k_of(Outputs(logits.clone(), lambda rows: rows.clone(), {}), 1)  # 1400 rows: two chunks
    expected = logits[..., 1:].logsumexp(-1) - logits.logsumexp(-1)
    torch.testing.assert_close(as_outputs(stored).log_tail, expected)
    assert float(expected.max()) < -30 and stored["ids"].dtype == torch.uint16


def test_a_token_that_is_ruled_out_has_probability_zero_and_no_infinite_logarithm() -> None:
    logits = torch.tensor([[[1.0, 0.0, -torch.inf]]])
    answer = as_outputs(top_k_of(Outputs(logits, lambda rows: rows.clone(), {}), 3))
    assert bool(answer.log_probs.isfinite().all()) and answer.log_probs.exp()[0, 0, 2] == 0


def test_rows_that_are_missing_are_counted_before_the_first_step_and_refused_at_any(tmp_path: Path) -> None:
    data, other = rows(), rows(seed=1)
    fill(cached(tmp_path), data, [[0, 1], [2]])
    teacher = cached(tmp_path)
    with pytest.raises(ValueError, match=r"3 of 6 rows are cached; run `kdqat cache RECIPE` \(another seq_len, pack"):
        teacher.require_answers(data.row_keys, frozenset())
    assert teacher.missing(data.row_keys()) == [3, 4, 5]
    with pytest.raises(ValueError, match="0 of 3 rows are cached"):
        teacher.outputs(other.batch(INDEX))
    with pytest.raises(ValueError, match=r"row_keys.*FrozenTeacher"):
        teacher.outputs(Batch(*other.batch(INDEX)[:2]))


@pytest.mark.parametrize("want", ["hidden_states", "attentions"])
def test_what_nobody_kept_is_refused_before_the_first_step(want: str, tmp_path: Path) -> None:
    teacher = cached(tmp_path, kind="hidden")
    with pytest.raises(ValueError, match=rf"keeps no {want}.*FrozenTeacher"):
        teacher.require_answers(list, frozenset({want}))


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_filling_that_was_interrupted_keeps_what_it_had_and_goes_on(kind: str, tmp_path: Path) -> None:
    data = rows()
    teacher = cached(tmp_path, kind=kind)
    teacher.teacher.prepare(SOURCE, SplitModel(SOURCE.load_model()), toy_tokenizer(), pristine=True)

    def until_the_power_fails():
        yield data.batch(torch.tensor([0, 1]))
        yield data.batch(torch.tensor([2]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(teacher.fill(until_the_power_fails()))
    again = cached(tmp_path, kind=kind)
    assert again.missing(data.row_keys()) == [3, 4, 5]
    fill(again, data, [[3, 4, 5]])
    assert not cached(tmp_path, kind=kind).missing(data.row_keys())


def test_the_same_folder_refuses_another_model_tokenizer_kind_and_arithmetic(tmp_path: Path) -> None:
    fill(cached(tmp_path), rows())
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = "<bos>"
    for name, changes in {
        "model": {"source": ModelSource("toy:qwen2")},
        "tokenizer": {"tokenizer": tokenizer},
        "k": {"k": 9},
        "kind": {"kind": "hidden"},
        "dtype": {"dtype": "bfloat16"},
    }.items():
        with pytest.raises(ValueError, match=rf"was made with .*another {name} \(.*run `kdqat cache RECIPE`"):
            cached(tmp_path, **changes)  # type: ignore[arg-type]


def test_without_a_folder_each_teacher_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDQAT_CACHE", str(tmp_path))
    folders = []
    for changes in ({}, {"k": 9}, {"kind": "hidden"}, {}):
        teacher = CachedTeacher(**changes)  # type: ignore[arg-type]
        teacher.prepare(SOURCE, SplitModel(SOURCE.load_model()), toy_tokenizer(), pristine=True)
        assert teacher.cache is not None
        folders.append(teacher.cache.folder)
    assert len(set(folders)) == 3 and folders[0] == folders[3]
    assert all(folder.parent == tmp_path / "teachers" and "toy-llama" in folder.name for folder in folders)


class Padded(ModelSource):
    """A teacher with a padded head."""

    def load_model(self) -> nn.Module:
        return toy_model("qwen2", vocab_size=272).eval()

    def load_config(self):
        return toy_model("qwen2", vocab_size=272).config


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_padded_head_is_cut_as_for_the_live_teacher(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdqat.models.teacher.ModelSource", Padded)
    monkeypatch.setattr("kdqat.models.cached_teacher.ModelSource", Padded)
    data, student = rows(), SplitModel(SOURCE.load_model())
    fill(cached(tmp_path, path="toy:qwen2", kind=kind, k=260), data)
    teacher = cached(tmp_path, path="toy:qwen2", kind=kind, k=260, student=student)
    batch = data.batch(torch.tensor([0, 1, 2]))
    answer, reference = teacher.outputs(batch), teacher.judge()
    reference.prepare(SOURCE, student, toy_tokenizer(), pristine=False)
    expected = reference.outputs(batch)
    assert student.vocab_size == 260 and isinstance(expected, Outputs)
    logits = expected.head(expected.hidden)
    if isinstance(answer, TopKOutputs):
        torch.testing.assert_close(dense(answer, 260), logits.log_softmax(-1), rtol=2**-10, atol=1e-6)
    else:
        assert torch.equal(answer.head(answer.hidden), logits) and logits.shape[-1] == 260


def test_nonsense_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        CachedTeacher(k=0)
    with pytest.raises(ValueError, match="k=300 exceeds the 260 tokens of toy:llama: lower it"):
        cached(tmp_path, k=300)


def test_answers_that_are_not_numbers_are_not_stored(tmp_path: Path) -> None:
    teacher, data = cached(tmp_path), rows()
    teacher.teacher.prepare(SOURCE, SplitModel(SOURCE.load_model()), toy_tokenizer(), pristine=True)
    with torch.no_grad():
        teacher.teacher.split.model.model.norm.weight[0] = torch.nan  # type: ignore[union-attr,operator,index]
    with pytest.raises(ValueError, match="not numbers: load it in float32 or bfloat16"):
        list(teacher.fill([data.batch(INDEX)]))
    assert not list(tmp_path.glob("rows-*"))
