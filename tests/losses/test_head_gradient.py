"""The head's gradient in 16 bits: products are added in fp32, what is small in fp16 survives, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kdqat.losses.chunk as chunk
import kdqat.losses.projected as projected
from kdqat.losses import CrossEntropy, ForwardKL
from kdqat.losses.head_gradient import add_product, adds_in_fp32
from kdqat.types import Batch, Outputs, Projection
from tests.losses.toy import assert_near, random_batch


def wide(vocabulary: int = 300, width: int = 32) -> tuple[Tensor, Tensor, Outputs, Batch]:
    """Hidden states and a weight as leaves, a teacher near them, and a batch of 4 x 64 targets."""
    torch.manual_seed(0)
    batch = random_batch(4, 65)
    hidden, weight = torch.randn(4, 65, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    near = (weight + 0.1 * torch.randn(vocabulary, width)).detach()
    return hidden, weight, Outputs(hidden.detach(), lambda h: h @ near.T, {}), batch


def run_wide(hidden: Tensor, weight: Tensor, teacher: Outputs, batch, *, projects: bool = True, chunk_tokens: int = 16):
    hidden.grad = weight.grad = None
    projection = (lambda: Projection(weight, None, lambda logits: logits)) if projects else None
    student = Outputs(hidden, lambda h: torch.nn.functional.linear(h, weight), {}, projection)
    return ForwardKL(chunk_tokens=chunk_tokens)(student, teacher, batch).sum


def test_the_weights_gradient_under_autocast_is_summed_and_handed_on_in_fp32():
    hidden, weight, teacher, batch = wide()
    rows = hidden.detach()[:, :-1].flatten(0, 1).bfloat16()
    logits = (rows @ weight.detach().T.bfloat16()).requires_grad_()
    ForwardKL().token_loss(logits, teacher.head(teacher.hidden[:, :-1].flatten(0, 1)), None).sum().backward()
    exact, errors = logits.grad.double().T @ rows.double(), []
    for projects in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            total = run_wide(hidden, weight, teacher, batch, projects=projects, chunk_tokens=4)
        total.backward()
        errors.append(((weight.grad - exact).norm() / exact.norm()).item())
        assert weight.grad.dtype == hidden.grad.dtype == torch.float32
        assert torch.equal(weight.grad, weight.grad.bfloat16().float()) != projects
    assert errors[0] < 0.002 and errors[0] < errors[1] / 2  # 64 chunks, each rounded; and a sum rounded 64 times


def test_fp16_keeps_gradients_that_a_loss_scale_would_come_too_late_for():
    hidden, weight, teacher, batch = wide(vocabulary=20000, width=8)
    with torch.no_grad():
        hidden *= 0.01  # nearly uniform predictions, near the teacher's: g is about 1e-7
        for leaf in (hidden, weight):
            leaf.copy_(leaf.half())  # so that fp16 rounds only what is made of them
    teacher = teacher._replace(hidden=hidden.detach())
    run_wide(hidden, weight, teacher, batch, chunk_tokens=64).backward()
    exact = [hidden.grad, weight.grad]
    with torch.autocast("cpu", torch.float16):
        total = run_wide(hidden, weight, teacher, batch, chunk_tokens=64)
    (total * 2.0**16).backward()
    assert_near([hidden.grad / 2**16, weight.grad / 2**16], exact, 0.02)


def test_what_fp16_gradients_are_multiplied_by_makes_none_of_them_too_large():
    hidden, weight, teacher, batch = wide()
    with torch.no_grad():
        hidden /= 40
        weight *= 40
    teacher = teacher._replace(hidden=-20 * hidden.detach())  # far away
    with torch.autocast("cpu", torch.float16):
        run_wide(hidden, weight, teacher, batch).backward()
    assert hidden.grad.isfinite().all() and projected.FP16_SCALE * hidden.grad.abs().max() > 65504


def test_a_sum_takes_products_of_narrower_factors():
    torch.manual_seed(0)
    left, right = torch.randn(7, 5), torch.randn(5, 3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.002)):
        total = torch.ones(7, 3)
        add_product(total, left.to(dtype), right.to(dtype))
        assert (total - 1 - left @ right).norm() <= tolerance * (left @ right).norm()
    total = torch.zeros(1, 1)
    add_product(total, torch.full((1, 8), 200.0).half(), torch.full((8, 1), 200.0).half())
    assert total.item() == 320000  # beyond fp16


def test_compiled_is_eager_and_keeps_no_fp32_logits():
    torch._dynamo.reset()
    hidden, weight, teacher, batch = wide()
    saved: list[tuple[torch.Size, torch.dtype]] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x.shape, x.dtype)) or x, lambda x: x)
    results = []
    for compiled in (False, True):
        terms = chunk.Terms({"kl": ForwardKL().token_loss, "ce": CrossEntropy().token_loss}, (1.0, 0.3), {})
        with torch.no_grad():
            logits = (hidden[0] @ weight.T).bfloat16()
            answer = teacher.head(hidden[0]).bfloat16()
        with keep if compiled else torch.no_grad():
            results.append(
                projected.value_and_grad(terms, lambda x: x, logits, answer, batch.labels[0], compiled=compiled)
            )
    (eager, eager_gradient), (sums, gradient) = results
    torch.testing.assert_close(sums, eager, rtol=1e-4, atol=0)
    assert gradient.dtype == torch.bfloat16
    assert_near([gradient], [eager_gradient], 0.004)
    assert {dtype for shape, dtype in saved if shape == logits.shape} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_16_bit_products_are_added_in_fp32(dtype):
    hidden, weight, teacher, batch = wide()
    run_wide(hidden, weight, teacher, batch).backward()
    exact = [hidden.grad, weight.grad]
    hidden, weight = (x.detach().cuda().requires_grad_() for x in (hidden, weight))
    near = teacher.head(torch.eye(32)).T.cuda()
    teacher = Outputs(hidden.detach(), lambda h: h @ near.T, {})
    batch = batch._replace(input_ids=batch.input_ids.cuda(), labels=batch.labels.cuda())
    errors = []
    for projects in (True, False):  # added up here, or by autograd chunk by chunk, in 16 bits
        with torch.autocast("cuda", dtype):
            total = run_wide(hidden, weight, teacher, batch, projects=projects, chunk_tokens=4)
        total.backward()
        pairs = zip([hidden.grad.cpu(), weight.grad.cpu()], exact, strict=True)
        errors.append([((ours - best).norm() / best.norm()).item() for ours, best in pairs])
    assert adds_in_fp32("cuda", dtype)
    (rows, product), (plain_rows, plain_product) = errors  # logits of 16 bits are most of either's error
    assert rows <= 1.1 * plain_rows and product <= 1.1 * plain_product < 0.2
