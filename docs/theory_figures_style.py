"""Colours and settings of the pictures of docs/theory.md."""

from __future__ import annotations

import torch

F64 = torch.float64
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#888888"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "odelayers",  # the same file at every run
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
