"""Fixtures for the tests of exports."""

from tests.exporters.reading import codes_file, reader_here

__all__ = ["codes_file", "reader_here"]
