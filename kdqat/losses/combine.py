"""A weighted sum of losses, with one pass of the heads for all that need logits.

    terms: [ForwardKL, CrossEntropy]    weights: [1.0, 0.2]

Composition by listing: a mixture is a recipe's business, no loss has a flag for another one.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from kdqat.losses.base import DistillLoss
from kdqat.losses.logits import LogitLoss, sum_logit_losses
from kdqat.types import Batch, LossParts, Outputs, TopKOutputs


class WeightedSum(DistillLoss):
    """sum_i weights[i] * terms[i]. `reduction` and `wants` come from the terms.

    `by_name` has every term, unweighted, under its name ("forward_kl"; a second one of its class gets
    "forward_kl_2"), and "kl" if there is a teacher and a loss on logits. The smallest chunk_tokens among the terms
    holds for all. A WeightedSum as a term works, but runs the heads for itself: list its terms instead.

    Args:
        terms: the losses; all with the same reduction.
        weights: one factor for each.

    Raises:
        ValueError: for no terms, another number of weights, a weight that is not finite, or terms whose reductions
            differ.
    """

    def __init__(self, terms: list[DistillLoss], weights: list[float]) -> None:
        if not terms or len(terms) != len(weights):
            raise ValueError(f"weights has {len(weights)} entries for {len(terms)} terms: give one for each term")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights {weights} must be finite numbers")
        reductions = {term.reduction for term in terms}
        if len(reductions) > 1:
            raise ValueError(
                "the terms have different reductions, so they share no denominator: give all of them "
                "reduction='token_mean' or all 'sequence_sum', and move the factor between them into weights"
            )
        super().__init__(reduction=terms[0].reduction)
        self.terms = nn.ModuleList(terms)
        self.weights = list(weights)
        self.wants = frozenset().union(*(term.wants for term in terms))
        self.needs_teacher = any(term.needs_teacher for term in terms)

    def compile_chunks(self) -> None:
        """See `LogitLoss`; of all terms."""
        for term in self.terms:
            assert isinstance(term, DistillLoss)
            term.compile_chunks()

    def forward(self, student: Outputs, teacher: Outputs | TopKOutputs | None, batch: Batch) -> LossParts:
        """The weighted sum of one micro-batch.

        Raises:
            ValueError: what the terms raise.
        """
        terms = self._named_terms()
        for term in terms.values():
            term.check_teacher(teacher)
        weights = dict(zip(terms, self.weights, strict=True))
        on_logits = {name: term for name, term in terms.items() if isinstance(term, LogitLoss)}
        total, by_name = student.hidden.new_zeros(()), dict[str, Tensor]()
        if on_logits:
            factors = [weights[name] for name in on_logits]
            compiled = any(term.compiled for term in on_logits.values())
            total, by_name = sum_logit_losses(on_logits, factors, student, teacher, batch, compiled=compiled)
        for name, term in terms.items():
            if name in on_logits:
                continue
            parts = term(student, teacher, batch)
            total = total + weights[name] * parts.sum
            by_name[name] = parts.sum.detach()
            for key, value in parts.by_name.items():
                by_name.setdefault(key, value)
        return LossParts(total, self.num_targets(batch), by_name)

    def _named_terms(self) -> dict[str, DistillLoss]:
        named: dict[str, DistillLoss] = {}
        for term in self.terms:
            assert isinstance(term, DistillLoss)
            taken = sum(other.name == term.name for other in named.values())
            named[f"{term.name}_{taken + 1}" if taken else term.name] = term
        return named
