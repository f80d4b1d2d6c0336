"""Linear layers of a frozen model in float8 e4m3 (https://arxiv.org/abs/2209.05433): for a teacher that only answers.

The weight is rounded once, with a scale for each output channel; inputs are rounded as they come, with a scale for each
token. GPUs since Ada and Hopper multiply the codes themselves (torch._scaled_mm); anywhere else the same codes are
multiplied in float32, which is slower than not to round at all and shows what float8 costs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdqat.models.roles import layer_refs
from kdqat.types import ROUTER

log = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
MULTIPLE = 16  # what the kernel asks of both widths of a layer


def to_e4m3(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in the shape of `tensor` [R, I], and the scales of its rows [R, 1], fp32: value = scale * code."""
    values = tensor.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (values / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class Float8Linear(nn.Module):
    """A frozen linear layer [.., I] -> [.., O] computed in float8.

    Attributes:
        weight, scale: codes [O, I] and their scales [O, 1].
        bias: of the layer, in its own dtype.
        native: multiply codes, as the device can; False: emulate.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = to_e4m3(linear.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.native = False

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = to_e4m3(x.reshape(-1, x.shape[-1]))
        if self.native:  # [R, I] times column-major [I, O]; the kernel writes bf16
            y = torch._scaled_mm(codes, self.weight.t(), scale, self.scale.t(), out_dtype=torch.bfloat16)
        else:
            y = F.linear(codes.float(), self.weight.float()) * scale * self.scale.t()
        y = y.to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def to_float8(model: Any) -> None:
    """Turn the linear layers of the model's blocks into Float8Linear; what stays is counted in the log.

    Routers, experts in one tensor, Conv1D and widths that 16 does not divide stay as they are; so does the head.

    Raises:
        ValueError: if there is nothing to turn.
    """
    layers = {ref.name: ref for ref in layer_refs(model) if ref.block is not None}
    modules, stays = dict(model.named_modules()), []
    for name, ref in layers.items():
        module = modules.get(name)  # None: the weight of one of several experts
        if type(module) is not nn.Linear or ref.role == ROUTER or any(width % MULTIPLE for width in ref.shape):
            stays.append(name)
        else:
            model.set_submodule(name, Float8Linear(module))
    if len(stays) == len(layers):
        raise ValueError(
            f"teacher fp8: none of the {len(layers)} layers in the blocks is a linear one with widths that {MULTIPLE} "
            "divides; leave fp8 out"
        )
    rest = f"; {len(stays)} stay in {str(model.dtype).removeprefix('torch.')} (e.g. {stays[0]})" if stays else ""
    log.info("teacher: %d of %d layers compute in float8%s", len(layers) - len(stays), len(layers), rest)


def settle(model: nn.Module, device: torch.device) -> None:
    """Let the Float8Linear of `model` compute as `device` can; says so where that is slow."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    for layer in layers:
        layer.native = native
    if layers and not native:
        log.warning("teacher fp8: %s has no float8 arithmetic; it is emulated, and slower than without fp8", device)
