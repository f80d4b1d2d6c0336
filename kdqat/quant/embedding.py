"""Fake-quantized nn.Embedding: a channel is a token's row, as in LLM-FP4 and in GGUF's token_embd."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from kdqat.quant.layer import FakeQuantLayer, default_activation_quantizer
from kdqat.quant.quantizer import QuantizerFactory
from kdqat.spec import LayerScheme

# A lookup whose rows are multiplied by `embed_scale`; by its full name: this package imports no transformers.
SCALED_EMBEDDINGS = frozenset(
    {
        "transformers.models.gemma.modeling_gemma.GemmaTextScaledWordEmbedding",
        "transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding",
        "transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding",
    }
)


class FakeQuantEmbedding(FakeQuantLayer, nn.Embedding):
    """A lookup of rows [V, H], times `embed_scale` where the plain embedding has one (Gemma).

    Its input are ids, which nobody quantizes.
    """

    plain_class = nn.Embedding
    embed_scale: Any

    @classmethod
    def wraps(cls, module: nn.Module) -> bool:
        scaled = f"{type(module).__module__}.{type(module).__qualname__}" in SCALED_EMBEDDINGS
        return scaled or super().wraps(module)

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        scheme: LayerScheme,
        quantizer: QuantizerFactory,
        activation_quantizer: QuantizerFactory = default_activation_quantizer,
        deploy_only: Collection[str] = (),
    ) -> Self:
        if scheme.activation is not None or scheme.output is not None:
            raise ValueError(
                "an embedding has only a weight to quantize: leave activation and output out of its scheme"
            )
        return super().wrap(module, scheme, quantizer, activation_quantizer, deploy_only)

    def forward(self, input: Tensor) -> Tensor:
        table = self.fake_quantized_weight()
        rows = F.embedding(
            input, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)
