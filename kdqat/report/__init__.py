"""Run directories and what is said about them. Imports no torch."""

from kdqat.report.report import describe, report
from kdqat.report.run_dir import RunDir, environment, read_yaml
from kdqat.report.table import markdown, print_table, removed_share

__all__ = ["RunDir", "describe", "environment", "markdown", "print_table", "read_yaml", "removed_share", "report"]
