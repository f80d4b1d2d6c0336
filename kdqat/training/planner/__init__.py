"""What a run will take, in memory and time, before a weight is loaded (docs/memory.md)."""

from kdqat.training.planner.moments import PARTS
from kdqat.training.planner.plan import MemoryPlan, plan_memory
from kdqat.training.planner.table import describe, print_plan

__all__ = ["PARTS", "MemoryPlan", "describe", "plan_memory", "print_plan"]
