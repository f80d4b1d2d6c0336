"""The values that travel between packages. Ours, not a library's: a loss or an exporter sees nothing else.

Letters in shapes: B batch, T tokens, H hidden width, V vocabulary, O out, I in, N groups, G group size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

EMBEDDING = "embedding"  # role of the input embeddings: they can be planned, and are nobody's matmul
ROUTER = "router"  # role of what sends tokens to experts: small, and left in full precision

IGNORE_INDEX = -100  # the label of a token that no loss counts; the value transformers uses


class Batch(NamedTuple):
    """One micro-batch, as the data package makes it and the training step receives it.

    `labels[b, t]` is the token *at* position t, or IGNORE_INDEX; the shift by one happens in `losses`.
    `segment_ids` numbers the documents packed into a row from 0; None means a row is one document.
    """

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64
    attention_mask: Tensor | None = None  # [B, T] 1 real, 0 padding; None: nothing is padded
    segment_ids: Tensor | None = None  # [B, T] int64
    position_ids: Tensor | None = None  # [B, T] int64, restarting with every segment
    row_keys: tuple[bytes, ...] | None = None  # B digests of the rows as a model sees them: a cached teacher's keys


class QParams(NamedTuple):
    """Scale and zero point, each of `QuantSpec.qparam_shape`: value = scale * (code - zero_point).

    With zero_point="minimum" the zero point is the minimum: value = scale * code + zero_point."""

    scale: Tensor
    zero_point: Tensor


class Projection(NamedTuple):
    """A head that is one matmul and a function of each logit: logits = transform(hidden @ weight.T + bias)."""

    weight: Tensor  # [V, H] as the head computes with it (fake-quantized), differentiable, before autocast
    bias: Tensor | None  # [V]
    # [..., V] -> [..., V'], pure: logit scale, soft-cap, cut vocabulary; None: the product is the logits
    transform: Callable[[Tensor], Tensor] | None


class Outputs(NamedTuple):
    """What a model answers. `head` turns hidden states into the model's own logits: bias, soft-cap and logit
    scale included. It is a *call*, because F.linear on the head's weight is wrong for about 30 families and
    breaks under FSDP2. Where the head is one matmul all the same, `projection` gives its parts."""

    hidden: Tensor  # [B, T, H] after the final norm
    head: Callable[[Tensor], Tensor]  # [..., H] -> [..., V]
    extras: Mapping[str, tuple[Tensor, ...]]  # whatever was in `wants`: "hidden_states", "attentions"
    projection: Callable[[], Projection] | None = None  # None: only `head` knows how


class TopKOutputs(NamedTuple):
    """What a teacher answers that kept its k largest log-probabilities and the probability of all other tokens."""

    ids: Tensor  # [B, T, k] integer
    log_probs: Tensor  # [B, T, k], of the full vocabulary at temperature 1
    log_tail: Tensor  # [B, T] log of the probability outside the k; -inf: none
    extras: Mapping[str, tuple[Tensor, ...]]  # empty, as for `Outputs`


class LossParts(NamedTuple):
    """A loss as a sum and what it was summed over, so that unequal micro-batches and ranks add up.

    `by_name` holds named sums over the same number (detached), for the log.
    """

    sum: Tensor  # 0-D, differentiable
    num: Tensor  # 0-D: what the sum is divided by: tokens (token_mean) or sequences (sequence_sum)
    by_name: Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerRef:
    """One layer of a model: where it is and what it is for.

    `block` is the index of its transformer block, None outside the blocks; `role` is one of q k v qkv o gate up
    gate_up down router lm_head pooler embedding, or the last part of its name where nothing is known about it. `shape`
    is that of the weight as a matrix [O, I].
    """

    name: str
    block: int | None
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BlockView:
    """What an initializer sees: the fake-quantized layers of one transformer block, by full name.

    `call` runs the block on calibration text (kdqat.calibrate.BlockCall); None for an initializer that needs none.
    """

    index: int | None
    layers: Mapping[str, Any]  # name -> kdqat.quant.QuantizedLayer
    call: Any = None
