"""Making the optimizer of a recipe: Adam's fused kernel where it is safe, and what bf16 latent weights ask for.

torch fuses Adam only if told to, while one kernel for all tensors instead of a dozen a tensor is faster everywhere it
exists (docs/optimizers.md has numbers). bf16 keeps 8 bits of a number: an update below 1/512 of a weight is lost when
it is rounded to nearest, and arrives on average when it is rounded stochastically.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from kdqat.quant import FakeQuantizer
from kdqat.training.optim import parameter_groups

log = logging.getLogger(__name__)


def make_optimizer(
    factory: Callable[[Any], Optimizer],
    model: nn.Module,
    *,
    precision: str = "32-true",
    world_size: int = 1,
    sharded: bool = False,
) -> Optimizer:
    """The optimizer that `factory` makes of the model's parameter groups, fused where that is safe.

    Args:
        factory: called with parameter groups.
        model: on its device already.
        precision, world_size: the trainer's.
        sharded: under FSDP2.

    Raises:
        ValueError: for latent weights or scales in a dtype that this optimizer cannot train, for an optimizer that
            cannot keep its state in shards, and for one that would round every process's weights differently.
    """
    groups = parameter_groups(model)
    parameters = [p for group in groups for p in group["params"]]  # the optimizer writes into the groups
    optimizer = factory(groups)
    for module in model.modules():
        if not isinstance(module, FakeQuantizer):
            continue
        if any(t.dtype != torch.float32 for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()):
            raise ValueError(
                f"trainer.precision {precision}: scales are kept in float32; take bf16-mixed, or 32-true with "
                "model.student.dtype: bfloat16, which leaves them alone"
            )
    for dtype in {p.dtype for p in parameters}:
        require_trainable(dtype, optimizer)
    if sharded and len({p.dtype for p in parameters}) > 1:
        raise ValueError(
            "model.parallel.shard: FSDP2 wants all trained parameters of a block in one dtype, and learned scales are "
            "float32; take model.student.dtype: float32, or a quantizer that learns no scale (MinMax, Fixed)"
        )
    package = type(optimizer).__module__.partition(".")[0]
    if world_size > 1 and package == "torchao" and any(p.dtype == torch.bfloat16 for p in parameters):
        raise ValueError(
            "trainer.devices: torchao rounds by each process's own noise, so that copies of bf16 weights would drift "
            "apart; take AdamWSR, whose noise is the same everywhere, or one device"
        )
    if sharded and package in ("bitsandbytes", "torchao"):
        raise ValueError(
            f"model.parallel.shard: the moments of {type(optimizer).__name__} cannot be gathered into one checkpoint; "
            "take torch.optim.AdamW, whose moments FSDP2 spreads over the devices, or DDP"
        )
    if precision != "16-mixed" and _can_fuse(optimizer, parameters):
        # before the first step `fused` is nothing but what the groups say (torch.optim.Adam._init_group)
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings["fused"] = True
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        log.info("optimizer: fused %s; fused: false in the recipe takes torch's plain one", type(optimizer).__name__)
    return optimizer


def require_trainable(dtype: torch.dtype, optimizer: Optimizer) -> None:
    """
    Raises:
        ValueError: if `optimizer` cannot train weights of `dtype`: bf16 needs stochastic rounding, fp16 never works.
    """
    rounds = bool(getattr(optimizer, "bf16_stochastic_round", False))
    if dtype == torch.float32 or (dtype == torch.bfloat16 and rounds):
        return
    raise ValueError(
        f"model.student.dtype {str(dtype).removeprefix('torch.')} and {type(optimizer).__name__}: latent weights are "
        "trained in float32 (AdamW at 2e-6 moves 4 % of bf16 weights), where trainer.precision: bf16-mixed makes the "
        "forward pass run in bf16; or in bfloat16 by an optimizer that rounds stochastically: AdamWSR, or "
        "torchao.optim.AdamW8bit with bf16_stochastic_round: true"
    )


def _can_fuse(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether nothing in the recipe or the parameters speaks against the fused kernel."""
    if type(optimizer) not in (Adam, AdamW):
        return False
    for group in optimizer.param_groups:
        if group["fused"] is not None or group["foreach"] is not None or group["capturable"] or group["differentiable"]:
            return False
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
