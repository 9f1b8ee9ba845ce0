"""How does a one-shot model run in ONNX Runtime?  One session; named arrays in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from runtime.backends.one_shot import OneShotSpec
from runtime.backends.one_shot_executor import LoadedOneShot
from runtime.backends.onnxruntime import MODEL, PROVIDERS, open_session, session_options


class OrtOneShot(LoadedOneShot[Any]):
    """One inference session; calls are independent."""

    backend = "onnxruntime"
    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)
    """ONNX Runtime's classes derive from Exception directly."""

    def call(self, loaded: Any, arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the session on named arrays."""
        names = [rule.name for rule in self.contract.inputs]
        outputs = [rule.name for rule in self.contract.outputs]
        return list(loaded.run(outputs, dict(zip(names, arrays, strict=True))))

    def end_profiling(self) -> str:
        """Stop profiling and name the profile's file; the session must have been opened for profiling."""
        return str(self.loaded.end_profiling())


def load_onnxruntime_one_shot(package: Path, spec: OneShotSpec) -> OrtOneShot:
    """Open `model.onnx` of a verified package folder; it is already optimized and is not rewritten again."""
    settings = {name: value for name, value in spec.flags.items() if name.startswith("session.")}
    options = session_options(threads=spec.threads, settings=settings)
    return OrtOneShot(open_session(package / MODEL, options, spec.providers or PROVIDERS), spec)
