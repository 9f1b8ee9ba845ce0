"""How far is a backend from the reference, and how far may it be?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "int8": 1e-1}
"""Largest accepted root mean square difference from eager float32, as a share of the reference's root mean square.

Measured on the reference model: 3e-6, 2e-2 to 5e-2, and 2e-2 for int8 in blocks.  Not the largest difference: a trained
model's sharp attention moves single bfloat16 logits by a tenth of the largest while every likeliest token stays."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a backend is from the reference on the fixture."""

    max_abs: float
    scale: float
    """Largest absolute reference logit."""
    relative_rms: float
    """Root mean square of the difference over that of the reference."""
    tolerance: float
    argmax_equal: int
    argmax_total: int
    reference: str = "eager float32"
    """What was compared with."""

    @property
    def within(self) -> bool:
        """Whether the difference is inside the stated tolerance."""
        return self.relative_rms <= self.tolerance

    def document(self) -> dict[str, Any]:
        """Describe the comparison; numbers as text, since floats are not hashed."""
        return {
            "reference": self.reference,
            "max_abs": f"{self.max_abs:.3e}",
            "largest_logit": f"{self.scale:.3e}",
            "relative_rms": f"{self.relative_rms:.3e}",
            "tolerance": f"relative_rms {self.tolerance:g}",
            "argmax_equal": f"{self.argmax_equal}/{self.argmax_total}",
            "within": self.within,
        }
