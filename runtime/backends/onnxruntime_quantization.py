"""How do the linear layers of an ONNX graph get int8 weights, so that a row still answers for itself alone?

`onnxruntime.quantization.quantize_dynamic` takes one activation scale for the whole batch, so the content of a
neighbour reaches a row: such a package could not be replayed with stand-ins (a test shows it).  MatMulNBits scales
weights and activations in blocks along the summed dimension of each row, and is no slower.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx

from runtime.backends.errors import BuildFailed

OPERATOR = "MatMulNBits"
BITS, BLOCK = 8, 32
"""Blocks of 32 keep a row's bits free of its batch; blocks of 128 and 256 do not (measured, ONNX Runtime 1.32)."""
INTEGER_PRODUCTS = 4
"""MLAS accuracy level at which activations are quantized too, while running."""
DESCRIPTION = f"{OPERATOR} bits={BITS} block_size={BLOCK} accuracy_level={INTEGER_PRODUCTS} symmetric"


@dataclass(frozen=True)
class Quantized:
    """A rewritten graph and what was rewritten."""

    model: onnx.ModelProto
    layers: int
    """Linear layers with int8 weights."""
    kept: int
    """Products left in float32: neither side is a stored weight."""


def quantize(model: onnx.ModelProto) -> Quantized:
    """Rewrite every product with a stored weight; bounds in the metadata are kept.  `model` itself is left alone.

    Raises BuildFailed of stage 4 where there is nothing to quantize.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    settings = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=INTEGER_PRODUCTS, bits=BITS
    )
    with _quiet():
        quantizer: Any = MatMulNBitsQuantizer(copied, algo_config=settings)
        quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    counts = Counter(node.op_type for node in made.graph.node)
    if not counts[OPERATOR]:
        raise BuildFailed(
            "the graph has no linear layer whose weights could be quantized",
            fix="prepare the model in float32",
            evidence={"operator_details": ", ".join(sorted(counts))},
            stage="a04",
        )
    return Quantized(made, counts[OPERATOR], counts["MatMul"])


@contextmanager
def _quiet() -> Generator[None]:
    """Hold back the quantizer's line about every node."""
    logger = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
