"""What a student is worth: agreement with its teacher and perplexity."""

from kdqat.evaluators.agreement import Perplexity, TeacherAgreement
from kdqat.evaluators.base import Evaluator, TextEvaluator, device_of

__all__ = ["Evaluator", "Perplexity", "TeacherAgreement", "TextEvaluator", "device_of"]
