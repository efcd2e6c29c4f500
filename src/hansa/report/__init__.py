"""Reports: one self-contained page about a run, or comparing several."""

from hansa.report.page import report

__all__ = ["report"]
