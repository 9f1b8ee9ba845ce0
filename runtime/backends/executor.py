"""What is alike in every loaded package?  What it was loaded with, the checks before a step, the end of its life."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import numpy as np

from runtime.backends.contract import InputContract, Integers, StepInputs
from runtime.backends.errors import BackendError, BackendRefused, classify_execution
from runtime.backends.invariant import arrange, columns_of, least_rows
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.models.config import ModelConfig

Loaded = TypeVar("Loaded")


class LoadedExecutor(ABC, Generic[Loaded]):
    """Holds what a backend loaded; a backend adds `new_pool` and `run`."""

    backend = ""
    failures: ClassVar[tuple[type[Exception], ...]] = (RuntimeError,)
    """What the backend raises when a step fails; it is named by `classify_execution`."""

    def __init__(self, loaded: Loaded, spec: LoadSpec) -> None:
        self._loaded: Loaded | None = loaded
        self.spec = spec
        self.least_rows = least_rows(spec.config)
        """Fewest rows of a layer whose bits are each row's own, in a batch-invariant package."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.spec.config

    @property
    def precision(self) -> str:
        """Working precision of weights, cache and activations."""
        return self.spec.precision

    @property
    def contract(self) -> InputContract:
        """What a step's inputs must satisfy."""
        return self.spec.contract

    @property
    def threads(self) -> int:
        """Compute threads of a step."""
        return self.spec.threads

    @property
    def loaded(self) -> Loaded:
        """What the backend loaded; `BackendRefused` once it is closed."""
        if self._loaded is None:
            raise BackendRefused("the executor has been closed", fix="load the package again")
        return self._loaded

    def step(
        self,
        tokens: Integers,
        positions: Integers,
        slots: Integers,
        context_lengths: Integers,
        pool: KVPool,
        *,
        last: Integers | None = None,
    ) -> StepOutput:
        """Check the inputs, then run the step; see `Executor.step`."""
        loaded = self.loaded
        self.spec.contract.check(tokens, positions, slots, context_lengths, num_slots=pool.num_slots, last=last)
        inputs = (plain(tokens), plain(positions), plain(slots), plain(context_lengths))
        if self.spec.batch_invariant:
            inputs = arrange(inputs, rows=self.least_rows, multiple=columns_of(self.backend))
        try:
            if last is None:
                output = self.run(loaded, inputs, pool)
            else:
                output = self.run_last(loaded, inputs, pool, last.repeat(len(inputs[0]) // len(tokens)))
        except BackendError:
            raise
        except self.failures as error:
            raise classify_execution(error, self.backend) from error
        if len(inputs[0]) != len(tokens):
            rows = len(tokens)
            return StepOutput(output.logits[:rows], output.new_k[:, :rows], output.new_v[:, :rows])
        return output

    @abstractmethod
    def run(self, loaded: Loaded, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Run the step on inputs that satisfy the contract; refuse a pool of another executor with `InputRefused`."""

    def run_last(self, loaded: Loaded, inputs: StepInputs, pool: KVPool, last: Integers) -> StepOutput:
        """Run the step for one token's logits a row, last [B]; a backend that can leaves the others uncomputed."""
        output = self.run(loaded, inputs, pool)
        return StepOutput(output.logits[np.arange(len(last)), last][:, None], output.new_k, output.new_v)

    def device_memory(self) -> dict[str, int] | None:
        """Tell the bytes that the backend's own allocator holds, by name; None where it has none to ask."""
        return None

    def close(self) -> None:
        """Drop what was loaded; the executor cannot step afterwards."""
        self._loaded = None


def plain(array: Integers) -> Integers:
    """Give an array as every backend reads it, copied where it is strided or read-only.

    NumPy calls an array of one element contiguous whatever its strides are; compiled code compares the strides.
    """
    if not array.flags.writeable:  # some importers of host memory want to be able to write
        return array.copy()
    stride = array.itemsize
    for size, found in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if found != stride:
            return array.copy()
        stride *= size
    return array
