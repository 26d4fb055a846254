"""Tables, figures and pages made from stored runs: all that the notebooks call."""

from __future__ import annotations

import logging

from harness.report.render import notebooks, render, suite

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # notes about its font cache have no place on a page

__all__ = ["notebooks", "render", "suite"]
