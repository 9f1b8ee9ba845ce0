"""How does the functional step run in ONNX Runtime?  A session with bound inputs over NumPy pools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtime.backends.errors import BuildFailed, ProviderMismatch
from runtime.backends.executor import LoadedExecutor, StepInputs
from runtime.backends.pool import ArrayPool, foreign_pool
from runtime.backends.protocol import KVPool, StepOutput

MODEL = "model.onnx"
PROVIDERS = ("CPUExecutionProvider",)
SMALL_INPUTS = ("token_ids", "positions", "slots", "context_lengths")
OUTPUTS = ("logits", "new_k", "new_v")
SETTINGS = {
    "session.disable_prepacking": "0",
    # A spinning pool starves everything else on a small machine and gains nothing with one thread.
    "session.intra_op.allow_spinning": "0",
}
"""Session settings with our defaults; the ones that a caller may change are in `onnxruntime_lowering.FLAGS`."""


ATTRIBUTES = {"session.memory_pattern": "enable_mem_pattern", "session.cpu_arena": "enable_cpu_mem_arena"}
"""Memory plan: settings that ONNX Runtime takes as attributes of its options instead of as entries."""


class OrtPool(ArrayPool):
    """NumPy tables that ONNX Runtime reads in place."""

    def __init__(self, *, num_layers: int, num_slots: int, width: int) -> None:
        super().__init__(num_layers=num_layers, num_slots=num_slots, width=width)
        self._view()

    def adopt(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """See `ArrayPool.adopt`."""
        super().adopt(k, v)
        self._view()

    def _view(self) -> None:
        self.k_value = onnxruntime.OrtValue.ortvalue_from_numpy(self.k)
        self.v_value = onnxruntime.OrtValue.ortvalue_from_numpy(self.v)


class OrtExecutor(LoadedExecutor[onnxruntime.InferenceSession]):
    """One inference session; calls are independent, so threads may share it."""

    backend = "onnxruntime"
    failures = (Exception,)  # ONNX Runtime's classes derive from Exception directly

    def new_pool(self, num_slots: int) -> KVPool:
        """Allocate a zeroed float32 pool."""
        return OrtPool(num_layers=self.config.num_layers, num_slots=num_slots, width=self.config.kv_width)

    def run(self, loaded: onnxruntime.InferenceSession, inputs: StepInputs, pool: KVPool) -> StepOutput:
        """Run the session with bound inputs."""
        if not isinstance(pool, OrtPool) or pool.k.shape[1] != self.config.kv_width:
            raise foreign_pool(pool)
        binding = loaded.io_binding()
        for name, array in zip(SMALL_INPUTS, inputs, strict=True):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_ortvalue_input("k_pool", pool.k_value)
        binding.bind_ortvalue_input("v_pool", pool.v_value)
        for name in OUTPUTS:
            binding.bind_output(name)
        loaded.run_with_iobinding(binding)
        logits, new_k, new_v = (value.numpy() for value in binding.get_outputs())
        return StepOutput(logits, new_k, new_v)

    def end_profiling(self) -> str:
        """Stop profiling and name the profile's file; the session must have been opened for profiling."""
        return str(self.loaded.end_profiling())


def session_options(*, threads: int, settings: Mapping[str, str], level: str = "disable") -> Any:
    """Make options: pinned threads, no spinning, no memory patterns (they would be cached for every new shape)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.graph_optimization_level = LEVELS[level]
    for name, value in {**SETTINGS, **settings}.items():
        if name in ATTRIBUTES:
            setattr(options, ATTRIBUTES[name], value == "1")
        else:
            options.add_session_config_entry(name, value)
    return options


LEVELS: Mapping[str, Any] = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def open_session(path: Path, options: Any, providers: tuple[str, ...]) -> onnxruntime.InferenceSession:
    """Open a session and hold it to the requested providers: ONNX Runtime itself falls back with a mere warning."""
    return open_session_of(str(path), options, providers)


def open_session_of(model: str | bytes, options: Any, providers: tuple[str, ...]) -> onnxruntime.InferenceSession:
    """Open a session on a file's path or on a model's bytes; see `open_session`."""
    check_available(providers)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's classes derive from Exception directly
        text = str(error).splitlines()[0][:500]
        raise BuildFailed(
            f"ONNX Runtime refused the model: {text}",
            fix="prepare the model again with this version of ONNX Runtime",
            evidence={"provider_log": text, "exception": type(error).__name__, "runtime_version": _version()},
        ) from error
    actual = tuple(session.get_providers())
    if actual != providers:
        raise ProviderMismatch(
            f"ONNX Runtime runs on {', '.join(actual)}, requested was {', '.join(providers)}",
            fix="install the provider or request another one",
            evidence={"provider_log": f"requested {providers}, actual {actual}", "runtime_version": _version()},
        )
    return session


def check_available(providers: tuple[str, ...]) -> None:
    """Refuse providers that this installation lacks."""
    available = onnxruntime.get_available_providers()
    absent = [name for name in providers if name not in available]
    if absent or not providers:
        raise ProviderMismatch(
            f"ONNX Runtime has no {', '.join(absent) or 'provider to run on'}; available: {', '.join(available)}",
            fix="request an available provider or install the ONNX Runtime build that has it",
            evidence={"provider_log": f"requested {providers}, available {available}", "runtime_version": _version()},
        )


def _version() -> str:
    return str(onnxruntime.__version__)
