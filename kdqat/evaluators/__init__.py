"""What a student is worth: agreement with its teacher, perplexity, and embeddings of sentences."""

from kdqat.evaluators.agreement import Perplexity, TeacherAgreement
from kdqat.evaluators.base import Evaluator, TextEvaluator, device_of
from kdqat.evaluators.embeddings import EmbeddingAgreement

__all__ = ["EmbeddingAgreement", "Evaluator", "Perplexity", "TeacherAgreement", "TextEvaluator", "device_of"]
