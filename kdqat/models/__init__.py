"""Models: where they come from, what their layers are for, body and head, and the teacher."""

from kdqat.models.cached_teacher import CachedTeacher
from kdqat.models.kv_cache import apply_kv_cache, strip_kv_cache
from kdqat.models.roles import block_prefix, blocks_of, embedding_refs, family_of, layer_refs, plannable_refs
from kdqat.models.select import select_layers
from kdqat.models.shared_teacher import SharedTeacher
from kdqat.models.source import ModelSource
from kdqat.models.split import SplitModel, cut_vocabulary
from kdqat.models.teacher import FrozenTeacher, Teacher

__all__ = [
    "CachedTeacher",
    "FrozenTeacher",
    "ModelSource",
    "SharedTeacher",
    "SplitModel",
    "Teacher",
    "apply_kv_cache",
    "block_prefix",
    "blocks_of",
    "cut_vocabulary",
    "embedding_refs",
    "family_of",
    "layer_refs",
    "plannable_refs",
    "select_layers",
    "strip_kv_cache",
]
