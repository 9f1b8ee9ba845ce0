"""How is an ONNX Runtime package opened?  With the executor that goes with its form of the step."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from runtime.backends.errors import BackendRefused
from runtime.backends.onnxruntime import MODEL, PROVIDERS, OrtExecutor, open_session, session_options
from runtime.backends.onnxruntime_resident import ResidentOrtExecutor
from runtime.backends.protocol import LoadSpec
from runtime.backends.step_form import resident_form

CONTEXT = "context"
"""The flag that names the form of the step: see `step_form`."""


def load_onnxruntime(package: Path, spec: LoadSpec) -> OrtExecutor:
    """Open `model.onnx` of a verified package folder; it is already optimized and is not rewritten again."""
    settings = {name: value for name, value in spec.flags.items() if name.startswith("session.")}
    options = session_options(threads=spec.threads, settings=settings)
    return executor_of(open_session(package / MODEL, options, spec.providers or PROVIDERS), spec)


def executor_of(session: onnxruntime.InferenceSession, spec: LoadSpec) -> OrtExecutor:
    """Make the executor for the form of step that the flags name; packages without the flag are gathered ones."""
    if spec.flags.get(CONTEXT) == "resident":
        _check_inputs(session, spec)
        return ResidentOrtExecutor(session, spec)
    return OrtExecutor(session, spec)


def _check_inputs(session: onnxruntime.InferenceSession, spec: LoadSpec) -> None:
    """Refuse a program from before its tables had their present shape: it would fail at its first step."""
    form = resident_form(spec.config, "float32", spec.contract.bounds)
    found = {one.name: len(one.shape) for one in session.get_inputs()}
    wanted = {name: value.dim() for name, value in zip(form.inputs, form.example, strict=True)}
    if found != wanted:
        raise BackendRefused(
            "the package was prepared by an earlier version, whose resident context had another form",
            fix="prepare the model again",
            evidence={"provider_log": f"inputs and ranks {found}, this version hands over {wanted}"},
        )
