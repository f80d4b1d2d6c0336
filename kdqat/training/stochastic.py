"""AdamW for bf16 weights: the update is computed in fp32 and rounded stochastically (https://arxiv.org/abs/2010.06192).

A weight takes the bf16 number above or below with the chance that makes it right on average, so that updates far
smaller than a bf16 step still arrive. torchao rounds so too, but only with moments of 8 bits or fewer, and keeps those
of small tensors in the weights' bf16, rounded to nearest, where a second moment cannot decay by 0.1 % a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

BUCKET = 1 << 24  # numbers whose fp32 copies exist at a time on a GPU: 64 MB each; a CPU takes one by one
_MOMENTS = ("exp_avg", "exp_avg_sq")


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 neighbours of fp32 `values`, in fp32; each is taken with the chance that makes it right on average.

    What is not finite becomes NaN.
    """
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    words.random_(-(1 << 63), None, generator=generator)  # 64 bits are the noise of four numbers
    noise = words.view(torch.int16)[: values.numel()].view(values.shape).int().bitwise_and_(0xFFFF)
    # bf16 is the upper half of fp32: noise below one unit of it carries over as often as the lower half is large
    rounded = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return rounded.add_(values - values)  # 0, or NaN: CUDA's own is all ones, which noise wraps around to -0


class AdamWSR(Optimizer):
    """AdamW whose bf16 parameters are rounded stochastically; parameters in float32 are trained as by torch's AdamW.

    The noise follows from seed, step and position of the parameter, so that a resumed run draws the same, and so do
    DDP's copies; FSDP2's shards draw each their own.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        state_dtype: of both moments of bf16 parameters, rounded stochastically as well; float32 parameters have float32
            moments.
        seed: of the rounding.

    Raises:
        ValueError: for numbers out of range, and at a step for parameters neither bf16 nor float32.
    """

    bf16_stochastic_round = True  # torchao's name for the same

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError("AdamWSR needs lr, eps, weight_decay >= 0 and 0 <= betas < 1")
        if state_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"AdamWSR: state_dtype {state_dtype!r} is unknown: use float32 or bfloat16")
        self.state_dtype, self.seed = state_dtype, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            numbered = [(first + i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            first += len(group["params"])
            for bucket in _buckets(numbered):
                self._update(bucket, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):  # Optimizer casts moments to the parameter's dtype
            for name in _MOMENTS:
                if name in state_dict["state"].get(i, {}):
                    self.state[parameter][name] = state_dict["state"][i][name].to(parameter.device)

    def _update(self, bucket: list[tuple[int, Tensor]], group: dict[str, Any]) -> None:
        """One step of a few parameters, list by list: a handful of kernels for all of them on a GPU."""
        beta1, beta2 = group["betas"]
        rate, parameters = float(group["lr"]), [p for _, p in bucket]
        steps = [self._advance(p) for p in parameters]
        averages, squares = ([_local(self.state[p][name]) for p in parameters] for name in _MOMENTS)
        weights = [_local(p) for p in parameters]
        latent = [w.float() for w in weights]  # of float32 parameters: themselves
        gradients = [_local(p.grad).float() for p in parameters]
        first, second = [a.float() for a in averages], [s.float() for s in squares]
        torch._foreach_mul_(latent, 1 - rate * group["weight_decay"])
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(second)
        torch._foreach_div_(divisors, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_addcdiv_(latent, first, divisors, [-rate / (1 - beta1**step) for step in steps])
        for i, (index, p) in enumerate(bucket):
            generator = self._generator(p, index, steps[i])
            for kept, new in ((weights[i], latent[i]), (averages[i], first[i]), (squares[i], second[i])):
                if kept.dtype == torch.bfloat16:  # moments too: nearest, a decay by 0.1 % a step would never happen
                    kept.copy_(round_stochastically(new, generator))

    def _advance(self, p: Tensor) -> int:
        """Count the parameter's step; its state is made at the first one."""
        if p.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"AdamWSR trains bfloat16 and float32 parameters, not {p.dtype}")
        state = self.state[p]
        if not state:
            dtype = torch.float32 if p.dtype == torch.float32 else getattr(torch, self.state_dtype)
            state["step"] = torch.tensor(0.0)  # on the CPU: reading it does not wait for the GPU
            for name in _MOMENTS:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["step"] += 1
        return int(state["step"])

    def _generator(self, p: Any, index: int, step: int) -> torch.Generator:
        shard = tuple(p.device_mesh.get_coordinate()) if hasattr(p, "device_mesh") else ()
        digest = hashlib.blake2b(repr((self.seed, step, index, shard)).encode(), digest_size=4).digest()
        if p.device not in self._generators:
            self._generators[p.device] = torch.Generator(p.device)
        return self._generators[p.device].manual_seed(int.from_bytes(digest, "little"))  # the CPU's takes 32 bits


def _local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _on_gpu(parameter: Tensor) -> bool:
    """Whether a kernel for many tensors is worth their copies."""
    return parameter.is_cuda


def _buckets(numbered: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Parameters of one dtype and device together, at most BUCKET numbers (or a single parameter) at a time."""
    kinds: dict[Any, list[tuple[int, Tensor]]] = {}
    for index, p in numbered:
        kinds.setdefault((p.dtype, p.device), []).append((index, p))
    for same in kinds.values():
        bucket: list[tuple[int, Tensor]] = []
        size = 0
        for index, p in same:
            length = _local(p).numel()
            if bucket and (not _on_gpu(p) or size + length > BUCKET):
                yield bucket
                bucket, size = [], 0
            bucket.append((index, p))
            size += length
        if bucket:
            yield bucket
