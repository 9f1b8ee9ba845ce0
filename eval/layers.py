"""In which layers can two runs differ, and in which order does one cause the next?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

Verdict = Literal["exact", "within_tolerance", "diverged", "unverified"]
Layer = Literal["input", "schedule", "bits", "margin", "token", "tool", "decision", "failure"]

LAYERS: tuple[Layer, ...] = ("input", "schedule", "bits", "margin", "token", "tool", "decision", "failure")
"""In causal order."""

TOKEN_LAYERS: frozenset[Layer] = frozenset({"schedule", "bits", "margin", "token"})
"""The layers that only a model's execution has."""

ENGINE_STAGES = frozenset({"b04", "b05", "b06"})
"""Queueing, prefill and decode: where the model runs."""

STAGE_LAYERS: Mapping[str, Layer] = {
    "b01": "input",
    "b02": "input",
    "b03": "decision",
    "b04": "schedule",
    "b05": "bits",
    "b06": "token",
    "b07": "tool",
    "b08": "decision",
    "b09": "decision",
    "b10": "decision",
}
"""The layer in which a stage's own document speaks."""

PROMPT_STAGES = frozenset({"b01", "b02", "b07"})
"""Stages whose documents are input to what follows.  All others' documents name pins, or repeat what tokens and
decisions say more precisely, so where only their digests differ they are asked last."""


def known_layers(layers: Collection[str]) -> frozenset[str]:
    """Check names of layers.

    Raises:
        ValueError: an unknown layer, or none at all.
    """
    wanted = frozenset(layers)
    unknown = sorted(wanted.difference(LAYERS))
    if unknown or not wanted:
        said = f"unknown layers: {', '.join(unknown)}" if unknown else "no layer to judge"
        raise ValueError(f"{said}; the layers are {', '.join(LAYERS)}")
    return wanted
