"""Does a backend compute what a one-shot model computes?  Fixture inputs of several sizes, and outputs to compare with.

The values come from SHAKE-256, so no library's generator can change them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.backends.comparison import TOLERANCE, Comparison
from runtime.backends.errors import BackendError, BackendRefused, ExecutionFailed
from runtime.backends.tensor_contract import Arrays, TensorContract, TensorRule
from runtime.models.source import ModelKind

BATCHES = (1, 3, 8)
"""Rows of the fixture's calls, as far as the contract admits them."""
OTHER_SIZE = 16
"""Size of every other free dimension."""


class OneShotExecutor(Protocol):
    """A loaded one-shot package: named tensors in, named tensors out."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def contract(self) -> TensorContract: ...
    @property
    def threads(self) -> int: ...

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Check the inputs, then run the model once.  Errors: `InputRefused`, `BackendError` and its classes."""
        ...

    def close(self) -> None:
        """Release what the backend holds; the executor cannot run afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class OneShotSpec:
    """What loading a one-shot package needs to know besides the files; all from its manifest, but the threads."""

    contract: TensorContract
    precision: str = "float32"
    flags: Mapping[str, str] = field(default_factory=dict[str, str])
    """The compiler manifest's flags."""
    providers: tuple[str, ...] = ()
    """Requested execution providers, in order."""
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class FixtureCase:
    """One call of the fixture."""

    name: str
    inputs: Arrays


@dataclass(frozen=True, kw_only=True)
class OneShotModel:
    """A captured one-shot model: what its calls must look like and what they should answer."""

    kind: ModelKind
    name: str
    digest: str
    contract: TensorContract
    precision: str
    reference: Callable[[Arrays], dict[str, NDArray[Any]]]
    """Computes a call by the reference; slow is fine."""
    reference_name: Callable[[], str]
    """Says what the reference was, once it has run."""
    _outputs: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict[str, Any])

    @property
    def tolerance(self) -> float:
        """Largest accepted relative root mean square difference of any output."""
        return TOLERANCE[self.precision]

    def cases(self) -> tuple[FixtureCase, ...]:
        """Make the fixture's calls."""
        return fixture_cases(self.contract)

    def expected(self, case: FixtureCase) -> dict[str, NDArray[Any]]:
        """Give the reference's outputs of a case, computed once."""
        if case.name not in self._outputs:
            try:
                self._outputs[case.name] = self.reference(case.inputs)
            except BackendError:
                raise
            except Exception as error:  # an evaluator's operators raise what they like
                shapes = {name: list(value.shape) for name, value in case.inputs.items()}
                raise BackendRefused(
                    f"the reference cannot run the model at {shapes}: {type(error).__name__}: {str(error)[:200]}",
                    fix="export the model with dimensions that can vary, or fix the ones that cannot",
                    evidence={"operator_details": str(error)[:500], "validation_output": str(shapes)},
                ) from error
        return self._outputs[case.name]

    def compare(self, executor: OneShotExecutor) -> Comparison:
        """Run the fixture on an executor and compare with the reference."""
        cases = self.cases()
        ours = {case.name: executor.run(case.inputs) for case in cases}
        theirs = {case.name: self.expected(case) for case in cases}
        return compare_outputs(ours, theirs, tolerance=self.tolerance, reference=self.reference_name())


def typical_sizes(contract: TensorContract) -> dict[str, int]:
    """Choose a size for every symbol: 3 rows, and 16 of everything else, as far as the bounds allow."""
    return {
        symbol: min(high, max(low, 3 if symbol == contract.batch else OTHER_SIZE))
        for symbol, (low, high) in contract.symbols.items()
    }


def fixture_cases(contract: TensorContract) -> tuple[FixtureCase, ...]:
    """Make calls of 1, 3 and 8 rows, or of 16 and twice that where no dimension is the batch."""
    typical = typical_sizes(contract)
    batch = contract.batch
    if batch is not None:
        low, high = contract.symbols[batch]
        chosen = [{**typical, batch: size} for size in sorted({min(high, max(low, size)) for size in BATCHES})]
    else:
        wider = {symbol: min(contract.symbols[symbol][1], 2 * size) for symbol, size in typical.items()}
        chosen = [typical] if wider == typical else [typical, wider]
    return tuple(
        FixtureCase(name=f"case{index}", inputs=fixture_inputs(contract, sizes, label=f"case{index}"))
        for index, sizes in enumerate(chosen)
    )


def fixture_inputs(contract: TensorContract, sizes: Mapping[str, int], *, label: str) -> dict[str, NDArray[Any]]:
    """Make inputs of the given sizes: floats in [-1, 1), integers inside their index range.

    Integers without a range are 1, with zeros at the end of every other row: most often they are a mask.
    """
    made: dict[str, NDArray[Any]] = {}
    for rule in contract.inputs:
        shape = contract.shape(rule, sizes)
        if shape is None:
            raise BackendRefused(
                f"input {rule.name} has a dimension without a size", evidence={"validation_output": str(rule.shape)}
            )
        made[rule.name] = _values(rule, shape, label)
    return made


def compare_outputs(
    ours: Mapping[str, Arrays], theirs: Mapping[str, Arrays], *, tolerance: float, reference: str
) -> Comparison:
    """Compare outputs case by case; the worst output decides.

    Errors: `ExecutionFailed` for another shape or dtype than the reference's, or for values that are not finite where
    the reference's are.
    """
    worst = scale = relative = 0.0
    equal = total = 0
    for case, outputs in theirs.items():
        for name, expected in outputs.items():
            found = ours[case][name]
            _check_comparable(f"{case}.{name}", found, expected)
            wanted, got = expected.astype(np.float64), found.astype(np.float64)
            finite = np.isfinite(wanted)
            difference = np.where(finite, got - np.where(finite, wanted, 0.0), 0.0)
            norm = math.sqrt(float((np.where(finite, wanted, 0.0) ** 2).sum()))
            distance = math.sqrt(float((difference**2).sum()))
            relative = max(relative, distance / norm if norm else distance)
            worst = max(worst, float(np.abs(difference).max(initial=0.0)))
            scale = max(scale, float(np.abs(np.where(finite, wanted, 0.0)).max(initial=0.0)))
            if expected.ndim > 1 and expected.shape[-1] > 1:
                same = got.argmax(-1) == wanted.argmax(-1)
                equal, total = equal + int(same.sum()), total + same.size
    return Comparison(
        max_abs=worst,
        scale=scale,
        relative_rms=relative,
        tolerance=tolerance,
        argmax_equal=equal,
        argmax_total=total,
        reference=reference,
    )


def output_digests(outputs: Mapping[str, Arrays]) -> dict[str, str]:
    """Name every output of every case by its bytes."""
    return {
        f"{case}.{name}": array_digest(value)
        for case, found in outputs.items()
        for name, value in sorted(found.items())
    }


def array_digest(value: NDArray[Any]) -> str:
    """Name an array by dtype, shape and bytes."""
    head = f"{value.dtype} {list(value.shape)} ".encode()
    return "sha256:" + hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()


def _check_comparable(name: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    wrong = None
    if found.shape != expected.shape or found.dtype != expected.dtype:
        wrong = f"is {found.dtype}{list(found.shape)}, expected {expected.dtype}{list(expected.shape)}"
    elif expected.dtype.kind == "f" and not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        wrong = "has values that are not finite where the reference's are, or the other way round"
    if wrong is not None:
        raise ExecutionFailed(
            f"output {name} {wrong}",
            fix="compare with the eager backend",
            evidence={"error_class": "output differs in kind", "output_completeness": name},
        )


def _values(rule: TensorRule, shape: tuple[int, ...], label: str) -> NDArray[Any]:
    count = math.prod(shape)
    stream = hashlib.shake_256(f"replaylab one-shot {label} {rule.name}".encode()).digest(4 * count)
    drawn = np.frombuffer(stream, dtype="<u4").astype(np.int64).reshape(shape)
    if rule.dtype.startswith("float"):
        return (drawn / 2.0**31 - 1.0).astype(rule.dtype)
    if rule.index_range is not None:
        low, high = max(0, rule.index_range[0]), rule.index_range[1]
        return (low + drawn % (high - low + 1)).astype(rule.dtype)
    ones = np.ones(shape, dtype=rule.dtype)
    if ones.ndim > 1:
        ones[1::2, ..., math.ceil(shape[-1] * 2 / 3) :] = 0
    return ones
