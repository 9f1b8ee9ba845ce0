"""Which of a package's kernels answer a row otherwise in other company?  Predicted from what stage 6 selected.

Measured on x86-64 with AVX-512 (MKL 2024.2, oneDNN 3.12, ONNX Runtime 1.32); the probe of stage 9 is the judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifests.compiler import CompilerManifest
from runtime.backends.invariant import RECIPE

MKL = "MKL sgemm takes another kernel for 1, for up to 10 or 15, and for more rows"
ATTENTION = "sums follow the padded context, and one query takes another kernel than many"


def varying_kernels(compiler: CompilerManifest, inventory: Mapping[str, Any]) -> dict[str, str]:
    """Name each kernel that is expected to vary, with the reason; empty where the recipe leaves none."""
    found: dict[str, str] = {}
    strict = compiler.flags.get(RECIPE) == "strict"
    for name in _linear_kernels(compiler, inventory):
        if not strict:
            found[name] = MKL
    if compiler.backend == "onnxruntime" and compiler.flags.get("session.disable_prepacking") == "1":
        found["MatMul (not prepacked)"] = "MLAS takes another path for one row"
    if compiler.precision == "bfloat16" and compiler.flags.get("norm") == "unfused":
        found["rsqrt"] = "the last rows of a batch take a scalar path"
    if not compiler.batch_invariant:
        found["attention"] = ATTENTION
    return found


def _linear_kernels(compiler: CompilerManifest, inventory: Mapping[str, Any]) -> list[str]:
    """Name the linear layers that MKL computes."""
    if compiler.precision != "float32":
        return []
    if compiler.backend == "eager":
        return [inventory["linear"]] if inventory.get("linear") == "mkl sgemm" else []
    library = inventory.get("library", {}) if compiler.backend == "inductor" else {}
    return [name for name in library if name.endswith(("_mm_out", "_addmm_out", "_bmm_out"))]
