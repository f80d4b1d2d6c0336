"""A model of which nothing is there but the head: what turns stored hidden states into the model's own logits.

It is the whole model on the meta device, which takes no memory, with a body that gives back what it is told to. So
`SplitModel` stays the only one who knows about heads: bias, logit scale, soft-cap, cut vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.models.source import ModelSource, auto_class
from kdqat.models.split import SplitModel
from kdqat.types import Batch, Outputs


class _StoredAnswer:
    """The forward pass of a body that gives back `hidden`, whatever it is asked."""

    hidden: Tensor | None = None

    def __call__(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)


def head_only(config: Any, source: ModelSource) -> SplitModel:
    """A model of `config` (changed) without weights; `load_head` gives it those of its head.

    Raises:
        ValueError: if it is no causal language model.
    """
    config._attn_implementation = None  # a student's may be that of its fake-quantized KV cache
    with torch.device("meta"):
        split = SplitModel(auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code))
    if not split.has_head or not split.family.causal:
        raise ValueError(f"CachedTeacher: {source.path} is an encoder; only a causal language model's answers are kept")
    # its forward pass only: transformers looks for the head by way of the body's modules
    split.model.get_submodule(split.family.body).forward = _StoredAnswer()
    return split.eval().requires_grad_(False)


def head_of(split: SplitModel) -> nn.Module:
    """The head's module."""
    assert split.family.head is not None
    return split.model.get_submodule(split.family.head)


def load_head(split: SplitModel, state: dict[str, Tensor]) -> None:
    """Give a model of `head_only` its head's tensors, in their own dtype."""
    head_of(split).load_state_dict(state, assign=True)
    head_of(split).requires_grad_(False)


def answer_with(split: SplitModel, batch: Batch, hidden: Tensor) -> Outputs:
    """What the model answers to `batch`, its last hidden states [B, T, H] being `hidden`."""
    stored: Any = split.model.get_submodule(split.family.body).forward
    stored.hidden = hidden
    try:
        return split(batch)
    finally:
        stored.hidden = None
