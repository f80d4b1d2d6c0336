"""SplitModel: a Hugging Face LM as body and head, so that a loss can go over the vocabulary chunk by chunk.

It is a module around the model (not a function beside it) because it is what FSDP2 wraps as root: its forward
gathers the root's parameters, the head among them, and they stay gathered until the backward pass has used them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.models.kv_cache import use_eager_attention
from kdqat.models.positions import counted_by_the_model
from kdqat.models.roles import family_of, logit_transform
from kdqat.quant import FakeQuantLinear
from kdqat.types import Batch, Outputs, Projection

NO_HEAD = "this encoder has no language-model head; judge it with EmbeddingAgreement"


class SplitModel(nn.Module):
    """`model` seen as hidden states and a head.

    Args:
        model: a Hugging Face causal (or masked) LM of a known family, or the body of one; kept as submodule `model`.

    Attributes:
        vocab_size: logits beyond it are cut off (see `cut_vocabulary`); None keeps all.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model)
        self.vocab_size: int | None = None
        self._scale, self._soft_cap = logit_transform(model.config)

    def forward(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Outputs:
        """Hidden states after the final norm [B, T, H], the head, and what a loss `wants`.

        Args:
            batch: on the model's device. Documents packed into one row see only themselves if it has segments.
            wants: subset of {"hidden_states", "attentions"}; attentions need eager attention.
        """
        kwargs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.segment_ids is not None:
            if not self.family.packs:
                raise ValueError("this model cannot keep packed documents apart: set document_mask/packing to false")
            kwargs["position_ids"] = batch.position_ids  # transformers reads document boundaries off the restarts
        elif batch.attention_mask is not None:
            kwargs["attention_mask"] = batch.attention_mask
        for want in wants:
            kwargs[f"output_{want}"] = True
        if not self.family.causal:
            kwargs.pop("use_cache")
        with counted_by_the_model() if {"position_ids", "attention_mask"}.isdisjoint(kwargs) else nullcontext():
            answer = self.model.get_submodule(self.family.body)(**kwargs)
        extras = {want: tuple(getattr(answer, want)) for want in wants}
        return Outputs(answer.last_hidden_state, self.head, extras, self.projection if self.projects else None)

    def head(self, hidden: Tensor) -> Tensor:
        """The model's own logits [..., V] of hidden states [..., H]: bias, logit scale and soft-cap included.

        Raises:
            ValueError: if the model has no head.
        """
        if self.family.head is None:
            raise ValueError(NO_HEAD)
        logits = self.model.get_submodule(self.family.head)(hidden)
        return logits if self._transform is None else self._transform(logits)

    def projection(self) -> Projection:
        """The same head as one matmul, its weight fake-quantized anew; only where it `projects`."""
        assert self.projects and self.family.head is not None
        head: Any = self.model.get_submodule(self.family.head)
        weight = head.fake_quantized_weight() if isinstance(head, FakeQuantLinear) else head.weight
        return Projection(weight, head.bias, self._transform)

    @property
    def projects(self) -> bool:
        """Whether the head is one matmul and a function of each logit: linear, its weight quantized at most. Not if
        it has forward hooks, which only a call runs."""
        if self.family.head is None:
            return False
        head = self.model.get_submodule(self.family.head)
        if head._forward_hooks or head._forward_pre_hooks:
            return False
        if isinstance(head, FakeQuantLinear):
            rounds = head.activation_fake_quantizer is not None or head.output_fake_quantizer is not None
            branches = head.adapter is not None and head.adapter.placement == "outside"
            return type(head).forward is FakeQuantLinear.forward and not rounds and not branches
        return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward

    @property
    def transforms(self) -> bool:
        """Whether logits are more than the head's product: scaled, soft-capped or cut."""
        return self._transform is not None

    @property
    def _transform(self) -> Callable[[Tensor], Tensor] | None:
        if self._scale == 1.0 and self._soft_cap is None and self.vocab_size is None:
            return None
        # a function of numbers, not a method: torch.compile looks into it, and has no business in a sharded module
        return partial(transform_logits, scale=self._scale, soft_cap=self._soft_cap, vocab_size=self.vocab_size)

    def use_eager_attention(self) -> None:
        """Attention that materialises its weights, slower: what a loss on attentions needs."""
        use_eager_attention(self.model)

    @property
    def has_head(self) -> bool:
        """Whether there are logits; a sentence encoder gives hidden states only."""
        return self.family.head is not None

    @property
    def num_logits(self) -> int:
        """How many logits the head gives before any cut; without a head a ValueError, as `head`."""
        if self.family.head is None:
            raise ValueError(NO_HEAD)
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def transform_logits(logits: Tensor, *, scale: float, soft_cap: float | None, vocab_size: int | None) -> Tensor:
    """What a model does to the product [..., V] of hidden states and head: scale, soft-cap, cut at `vocab_size`."""
    if scale != 1.0:
        logits = logits * scale
    if soft_cap is not None:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    return logits if vocab_size is None else logits[..., :vocab_size]


def cut_vocabulary(student: SplitModel, teacher: SplitModel, tokenizers: Callable[[], tuple[Any, Any]]) -> str | None:
    """Let teacher and student speak of the same tokens: cut padding rows of the larger head.

    Published checkpoints pad their heads to round numbers (Qwen: 151936 and 152064 for the same tokenizer). Where one
    of the two has no head there are no logits to compare, and only the tokenizers must agree.

    Args:
        student, teacher: their `vocab_size` is set if rows must be cut.
        tokenizers: gives (student's, teacher's).

    Returns:
        What was cut, for the log; None if nothing was.

    Raises:
        ValueError: if the two tokenizers do not number the same tokens alike.
    """
    our_tokenizer, their_tokenizer = tokenizers()
    our_vocab, their_vocab = our_tokenizer.get_vocab(), their_tokenizer.get_vocab()
    if not (student.has_head and teacher.has_head):
        if our_vocab != their_vocab:
            raise ValueError(
                f"vocabulary mismatch: the student has {len(our_vocab)} tokens, the teacher {len(their_vocab)}, "
                "numbered differently; a teacher needs the student's tokenizer"
            )
        return None
    ours, theirs = student.num_logits, teacher.num_logits
    size = min(ours, theirs)
    if our_vocab != their_vocab or max(our_vocab.values()) >= size:
        raise ValueError(
            f"vocabulary mismatch: the student has {ours} logits and {len(our_vocab)} tokens, the teacher {theirs} "
            f"logits and {len(their_vocab)} tokens, numbered differently; a teacher needs the student's tokenizer"
        )
    if ours == theirs:
        return None
    student.vocab_size = teacher.vocab_size = size
    return f"vocabulary: {ours} student and {theirs} teacher logits; {max(ours, theirs) - size} padding rows cut"
