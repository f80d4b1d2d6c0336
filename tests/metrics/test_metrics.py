"""Metrics against golden vectors (methods/core.md, section 9), torch's own functions and their edge cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdqat.metrics import perplexity, sqnr_db, token_confidence, token_kl, token_nll, top1_agreement
from kdqat.types import IGNORE_INDEX

TEACHER = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
STUDENT = torch.tensor([[1.5, 1.2, -0.5, 0.3]])


def test_token_kl_gives_the_golden_values_in_both_directions():
    assert token_kl(TEACHER, STUDENT).item() == pytest.approx(0.114394, abs=1e-5)
    assert token_kl(STUDENT, TEACHER).item() == pytest.approx(0.149245, abs=1e-5)


def test_token_kl_is_one_number_per_token_and_equals_torch():
    teacher, student = torch.randn(7, 9), torch.randn(7, 9)
    theirs = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert token_kl(teacher, student).shape == (7,)
    torch.testing.assert_close(token_kl(teacher, student), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_fp32(dtype):
    teacher, student = torch.randn(4, 9).to(dtype), torch.randn(4, 9).to(dtype)
    assert token_kl(teacher, student).dtype == torch.float32
    assert token_nll(student, torch.zeros(4, dtype=torch.long)).dtype == torch.float32
    torch.testing.assert_close(token_kl(teacher, student), token_kl(teacher.float(), student.float()))
    torch.testing.assert_close(token_nll(student, torch.arange(4)), token_nll(student.float(), torch.arange(4)))


def test_double_logits_stay_double():
    assert token_kl(TEACHER.double(), STUDENT.double()).dtype == torch.float64


def test_a_token_that_both_models_forbid_adds_nothing_to_the_kl():
    forbidden = torch.full((1, 1), -torch.inf)
    kl = token_kl(torch.cat([TEACHER, forbidden], 1), torch.cat([STUDENT, forbidden], 1))
    assert kl.item() == pytest.approx(0.114394, abs=1e-5)


def test_token_kl_refuses_two_vocabularies_and_names_their_sizes():
    with pytest.raises(ValueError, match=r"4 entries.*3"):
        token_kl(TEACHER, STUDENT[:, :3])
    with pytest.raises(ValueError, match=r"4 entries.*3"):
        top1_agreement(TEACHER, STUDENT[:, :3])


def test_token_nll_equals_the_negative_log_softmax_and_is_zero_for_ignored_labels():
    nll = token_nll(TEACHER.repeat(2, 1), torch.tensor([1, IGNORE_INDEX]))
    torch.testing.assert_close(nll, torch.stack([-TEACHER.log_softmax(-1)[0, 1], torch.tensor(0.0)]))


def test_top1_agreement_is_a_boolean_per_token():
    teacher = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    student = torch.tensor([[0.0, 9.0], [0.0, 9.0]])
    assert top1_agreement(teacher, student).tolist() == [True, False]


def test_token_confidence_is_the_largest_probability():
    assert token_confidence(TEACHER).item() == pytest.approx(0.643914, abs=1e-5)


def test_sqnr_of_a_tenth_of_noise_is_twenty_decibel():
    reference = torch.randn(50, 3)
    assert sqnr_db(reference, reference * 1.1).item() == pytest.approx(20.0, abs=1e-3)
    assert sqnr_db(reference.bfloat16(), reference.bfloat16() * 1.5).item() == pytest.approx(6.02, abs=0.1)


def test_sqnr_is_infinite_for_equal_tensors_zeros_included():
    assert sqnr_db(torch.ones(3), torch.ones(3)).item() == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)).item() == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)).item() == -math.inf


def test_sqnr_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="one shape"):
        sqnr_db(torch.ones(3, 3), torch.ones(3))


def test_perplexity_of_a_uniform_guess_is_the_vocabulary_size():
    nll = token_nll(torch.zeros(5, 32), torch.arange(5)).sum()
    assert perplexity(nll, 5) == pytest.approx(32.0, rel=1e-5)
    assert perplexity(nll.item(), torch.tensor(5)) == pytest.approx(32.0, rel=1e-5)


def test_perplexity_overflows_to_infinity_and_refuses_an_empty_text():
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="num_tokens"):
        perplexity(0.0, 0)
