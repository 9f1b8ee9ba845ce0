"""How does the functional step run in ONNX Runtime?  A session with bound inputs over NumPy pools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runtime.backends.contract import InputContract, Integers
from runtime.backends.errors import BackendRefused, BuildFailed, InputRefused, ProviderMismatch, classify_execution
from runtime.backends.pool import ArrayPool
from runtime.backends.protocol import KVPool, LoadSpec, StepOutput
from runtime.models.config import ModelConfig

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


class OrtPool(ArrayPool):
    """NumPy tables that ONNX Runtime reads in place."""

    def __init__(self, *, num_layers: int, num_slots: int, width: int) -> None:
        super().__init__(num_layers=num_layers, num_slots=num_slots, width=width)
        self.k_value = onnxruntime.OrtValue.ortvalue_from_numpy(self.k)
        self.v_value = onnxruntime.OrtValue.ortvalue_from_numpy(self.v)


class OrtExecutor:
    """One inference session; calls are independent, so threads may share it."""

    backend = "onnxruntime"

    def __init__(self, session: onnxruntime.InferenceSession, spec: LoadSpec) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._spec = spec

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._spec.config

    @property
    def precision(self) -> str:
        """Working precision of weights, cache and activations."""
        return self._spec.precision

    @property
    def contract(self) -> InputContract:
        """What a step's inputs must satisfy."""
        return self._spec.contract

    @property
    def threads(self) -> int:
        """Compute threads of a step."""
        return self._spec.threads

    def new_pool(self, num_slots: int) -> OrtPool:
        """Allocate a zeroed float32 pool."""
        config = self._spec.config
        return OrtPool(num_layers=config.num_layers, num_slots=num_slots, width=config.kv_width)

    def step(
        self, tokens: Integers, positions: Integers, slots: Integers, context_lengths: Integers, pool: KVPool
    ) -> StepOutput:
        """Check the inputs, then run the session; see `Executor.step`."""
        if self._session is None:
            raise BackendRefused("the executor has been closed", fix="load the package again")
        self._spec.contract.check(tokens, positions, slots, context_lengths, num_slots=pool.num_slots)
        if not isinstance(pool, OrtPool) or pool.k.shape[1] != self._spec.config.kv_width:
            raise InputRefused(
                "step input pool: not a pool of this executor",
                fix="allocate the pool with new_pool",
                evidence={"input_signature": type(pool).__name__, "guard": "pool kind and width"},
            )
        tables = pool
        try:
            binding = self._session.io_binding()
            for name, array in zip(SMALL_INPUTS, (tokens, positions, slots, context_lengths), strict=True):
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            binding.bind_ortvalue_input("k_pool", tables.k_value)
            binding.bind_ortvalue_input("v_pool", tables.v_value)
            for name in OUTPUTS:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            logits, new_k, new_v = (value.numpy() for value in binding.get_outputs())
        except Exception as error:  # ONNX Runtime's classes derive from Exception directly
            raise classify_execution(error, self.backend) from error
        return StepOutput(logits, new_k, new_v)

    def end_profiling(self) -> str:
        """Stop profiling and name the profile's file; the session must have been opened for profiling."""
        if self._session is None:
            raise BackendRefused("the executor has been closed", fix="load the package again")
        return str(self._session.end_profiling())

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def session_options(*, threads: int, settings: Mapping[str, str], level: str = "disable") -> Any:
    """Make options: pinned threads, no spinning, no memory patterns (they would be cached for every new shape)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.graph_optimization_level = LEVELS[level]
    for name, value in {**SETTINGS, **settings}.items():
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
    check_available(providers)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
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


def load_onnxruntime(package: Path, spec: LoadSpec) -> OrtExecutor:
    """Open `model.onnx` of a verified package folder; it is already optimized and is not rewritten again."""
    settings = {name: value for name, value in spec.flags.items() if name.startswith("session.")}
    options = session_options(threads=spec.threads, settings=settings)
    return OrtExecutor(open_session(package / MODEL, options, spec.providers or PROVIDERS), spec)


def _version() -> str:
    return str(onnxruntime.__version__)
