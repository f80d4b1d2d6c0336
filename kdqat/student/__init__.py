"""The student: a fake-quantized model with its plan. Prepared from a source, saved to a folder, loaded from one."""

from kdqat.student.adapters import attach_adapters, merge_adapters, merge_change
from kdqat.student.folder import QPARAMS_FILE, STUDENT_FILE, load_student, save_student, stored_activation
from kdqat.student.gguf import GGUFPlan, GGUFScales, student_from_gguf
from kdqat.student.prepare import block_views, install_plan, prepare_student
from kdqat.student.student import Student, as_rtn, plain_state, stored_bytes

__all__ = [
    "QPARAMS_FILE",
    "STUDENT_FILE",
    "GGUFPlan",
    "GGUFScales",
    "Student",
    "as_rtn",
    "attach_adapters",
    "block_views",
    "install_plan",
    "load_student",
    "merge_adapters",
    "merge_change",
    "plain_state",
    "prepare_student",
    "save_student",
    "stored_activation",
    "stored_bytes",
    "student_from_gguf",
]
