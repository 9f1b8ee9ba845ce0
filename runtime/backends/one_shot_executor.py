"""What do all one-shot executors do alike?  Check inputs, hold threads, check what came back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.errors import BackendError, BackendRefused, ExecutionFailed, classify_execution
from runtime.backends.one_shot import OneShotSpec
from runtime.backends.tensor_contract import Arrays, TensorContract, TensorRule, narrowest

Loaded = TypeVar("Loaded")


class LoadedOneShot(ABC, Generic[Loaded]):
    """Holds what a backend loaded of a one-shot model; a backend adds `call`."""

    backend = ""
    failures: ClassVar[tuple[type[Exception], ...]] = (RuntimeError,)
    """What the backend raises when a call fails; it is named by `classify_execution`."""

    def __init__(self, loaded: Loaded, spec: OneShotSpec) -> None:
        self._loaded: Loaded | None = loaded
        self._spec = spec

    @property
    def loaded(self) -> Loaded:
        """What the backend loaded; `BackendRefused` once it is closed."""
        if self._loaded is None:
            raise BackendRefused("the executor has been closed", fix="load the package again")
        return self._loaded

    @property
    def precision(self) -> str:
        """Working precision of the weights."""
        return self._spec.precision

    @property
    def contract(self) -> TensorContract:
        """What a call's inputs must satisfy."""
        return self._spec.contract

    @property
    def threads(self) -> int:
        """Compute threads of a call."""
        return self._spec.threads

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Check the inputs, run the model once, and check that every output has its promised dtype and shape."""
        loaded = self.loaded
        sizes = self.contract.check(inputs)
        try:
            outputs = self.call(loaded, [narrowest(inputs[rule.name]) for rule in self.contract.inputs])
        except BackendError:
            raise
        except self.failures as error:
            raise classify_execution(error, self.backend) from error
        for rule, value in zip(self.contract.outputs, outputs, strict=True):
            self._check_output(rule, value, sizes)
        return {rule.name: value for rule, value in zip(self.contract.outputs, outputs, strict=True)}

    @abstractmethod
    def call(self, loaded: Loaded, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the model on arrays in the contract's order; what it returns must outlive the backend's buffers."""

    def close(self) -> None:
        """Drop what was loaded; the executor cannot run afterwards."""
        self._loaded = None

    def _check_output(self, rule: TensorRule, value: NDArray[Any], sizes: dict[str, int]) -> None:
        shape = self.contract.shape(rule, sizes)
        if str(value.dtype) != rule.dtype or (shape is not None and value.shape != shape):
            expected = f"{rule.dtype}{list(shape) if shape is not None else list(rule.shape)}"
            raise ExecutionFailed(
                f"{self.backend} answered {rule.name} as {value.dtype}{list(value.shape)}, promised was {expected}",
                fix="prepare the model again; if it repeats, compare with the eager backend",
                evidence={"provider": self.backend, "error_class": "output shape", "output_completeness": rule.name},
            )


def owned(value: NDArray[Any]) -> NDArray[Any]:
    """Give an array that outlives the backend's buffers."""
    return np.array(value, order="C")
