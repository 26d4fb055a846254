"""Tables, figures and pages made from stored runs: all that the notebooks call."""

from __future__ import annotations

from harness.report.render import render

__all__ = ["render"]
