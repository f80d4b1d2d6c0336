"""A toy model, a little text for it, and what a full forward pass with hooks sees of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from kdqat.calibrate import BlockCall
from kdqat.models import SplitModel, layer_refs
from kdqat.models.toy import toy_model
from kdqat.quant import MinMax, apply_plan
from kdqat.spec import QuantPlan, preset
from kdqat.types import Batch


def split_model(kind: str = "llama") -> SplitModel:
    """In eval mode, on the CPU; its lm_head is not tied, so that a plan may name it."""
    return SplitModel(toy_model(kind, tie=False)).eval()


def quantized(kind: str = "llama") -> SplitModel:
    """The same with every linear in 2 bits, which changes all hidden states."""
    split = split_model(kind)
    modules = dict(split.model.named_modules())
    linears = [ref.name for ref in layer_refs(split.model) if isinstance(modules.get(ref.name), nn.Linear)]
    apply_plan(split.model, QuantPlan(dict.fromkeys(linears, preset("W2A16_G64"))), MinMax)
    return split


def text(rows: int = 2, tokens: int = 24, seed: int = 0) -> Batch:
    ids = torch.randint(3, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids)


def texts(count: int = 3) -> list[Batch]:
    return [text(seed=seed) for seed in range(count)]


def names_of(split: SplitModel, block: int | None) -> list[str]:
    """The layers of a block; None: those of the head. Fused experts, one module, have no layer names."""
    head = split.family.head
    refs = layer_refs(split.model)
    if block is None:
        return [ref.name for ref in refs if ref.name == head or ref.name.startswith(head + ".")]
    return [ref.name for ref in refs if ref.block == block and ref.name in dict(split.model.named_modules())]


@torch.no_grad()
def full_pass(split: SplitModel, batches: Iterable[Batch], block: int | None) -> dict[str, Tensor]:
    """Each layer's input [tokens, I] in plain forward passes of the whole model as it is."""
    heard: dict[str, list[Tensor]] = {name: [] for name in names_of(split, block)}
    with ExitStack() as stack:
        for name, found in heard.items():
            layer = split.model.get_submodule(name)
            hook = lambda _, args, f=found: f.append(args[0].reshape(-1, args[0].shape[-1]))  # noqa: E731
            stack.enter_context(layer.register_forward_pre_hook(hook))
        for batch in batches:
            outputs = split(batch)
            outputs.head(outputs.hidden)
    return {name: torch.cat(found) for name, found in heard.items()}


def hear(call: BlockCall, names: Iterable[str]) -> dict[str, Tensor]:
    """Each layer's input, as the call gives it."""
    heard: dict[str, list[Tensor]] = {name: [] for name in names}
    call.run(on_input={name: found.append for name, found in heard.items()})
    return {name: torch.cat(found) for name, found in heard.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        named = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=named)
