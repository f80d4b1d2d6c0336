"""KL and cross-entropy of rows of logits with their gradient, in two passes over memory (Triton).

A program handles a row. The first pass finds, online, the log-partition functions of student and teacher and the mean
of their difference under the teacher; the second writes the gradient where the student's logits were. Everything is
fp32 in registers. Composed, the same takes about fifteen passes; fused by inductor, seven.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # a forbidden token's -inf, as `metrics.log_probs` has it


@triton.jit
def kl_nll_kernel(
    student_ptr, teacher_ptr, labels_ptr, out_ptr, student_stride, teacher_stride, inverse_temperature,
    of_tempered, of_kl, of_nll, TEACHER: tl.constexpr, TEMPERED: tl.constexpr, GRADIENT: tl.constexpr,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = KL[p_T; q_T], KL[p; q], -log q[label]; of_* are what each weighs in the gradient (T for the first)."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    top_s, top_t = -3.4028234663852886e38, -3.4028234663852886e38  # finite: a block may hold forbidden tokens only
    sum_s, sum_t, mean, cold_s, cold_t, cold_mean = zero, zero, zero, zero, zero, zero
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lane < VOCABULARY
        s = tl.load(student_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
        new_s = tl.maximum(top_s, tl.max(s, axis=0))
        sum_s = sum_s * tl.exp(top_s - new_s) + tl.exp(s - new_s)
        if TEMPERED:
            cold_s = cold_s * tl.exp((top_s - new_s) * inverse_temperature) + tl.exp((s - new_s) * inverse_temperature)
        top_s = new_s
        if TEACHER:
            t = tl.load(teacher_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            new_t = tl.maximum(top_t, tl.max(t, axis=0))
            fade, weight = tl.exp(top_t - new_t), tl.exp(t - new_t)
            apart = tl.where(weight > 0, t - tl.maximum(s, LOWEST), 0.0)
            sum_t = sum_t * fade + weight
            mean = mean * fade + weight * apart
            if TEMPERED:
                fade = tl.exp((top_t - new_t) * inverse_temperature)
                weight = tl.exp((t - new_t) * inverse_temperature)
                apart = tl.where(weight > 0, t - tl.maximum(s, LOWEST), 0.0)
                cold_t = cold_t * fade + weight
                cold_mean = cold_mean * fade + weight * apart * inverse_temperature
            top_t = new_t
    total_s = tl.sum(sum_s, axis=0)
    log_s = top_s + tl.log(total_s)
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < VOCABULARY)
    chosen = tl.load(student_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(out_ptr + row * 3 + 2, log_s - chosen)
    log_t, cold_log_s, cold_log_t = 0.0, 0.0, 0.0
    if TEACHER:
        total_t = tl.sum(sum_t, axis=0)
        log_t = top_t + tl.log(total_t)
        tl.store(out_ptr + row * 3 + 1, tl.sum(mean, axis=0) / total_t - log_t + log_s)
    if TEMPERED:
        cold_log_s = top_s * inverse_temperature + tl.log(tl.sum(cold_s, axis=0))
        total_t = tl.sum(cold_t, axis=0)
        cold_log_t = top_t * inverse_temperature + tl.log(total_t)
        tl.store(out_ptr + row * 3, tl.sum(cold_mean, axis=0) / total_t - cold_log_t + cold_log_s)
    if GRADIENT:
        tl.debug_barrier()  # the label's logit was read
        for start in range(0, VOCABULARY, BLOCK):
            inside = start + lane < VOCABULARY
            s = tl.load(student_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = (of_kl + of_nll) * tl.exp(s - log_s)
            gradient -= tl.where(start + lane == label, of_nll, 0.0)
            if TEACHER:
                t = tl.load(teacher_ptr + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
                gradient -= of_kl * tl.exp(t - log_t)
                if TEMPERED:
                    gradient += of_tempered * tl.exp(s * inverse_temperature - cold_log_s)
                    gradient -= of_tempered * tl.exp(t * inverse_temperature - cold_log_t)
            tl.store(student_ptr + start + lane, gradient.to(student_ptr.dtype.element_ty), mask=inside)
