"""Which errors can the engine give?

RuntimeFailure
  CapacityRefused
    SequenceRefused     capacity_admission     the request can never fit, or the engine takes no more work
  RequestRefused
    GrammarRefused      validation_policy      the schema cannot constrain decoding
    SamplingRefused     validation_policy      the request itself is malformed
  ProviderFailed
    EngineFailed        model_provider         a step failed, or the engine has stopped
  PlanMissing           telemetry_persistence  the recorded schedule lacks a step that the replay needs
"""

from __future__ import annotations

from runtime.errors import CapacityRefused, ProviderFailed, RequestRefused, RuntimeFailure
from traces.failures import FailureClass


class SequenceRefused(CapacityRefused):
    """The request can never fit into this engine, or the engine is closing; nothing was queued."""


class GrammarRefused(RequestRefused):
    """The JSON schema cannot constrain decoding: malformed, unsupported keyword, or too large."""


class SamplingRefused(RequestRefused):
    """Empty prompt, token outside the vocabulary, or sampling settings outside their range."""


class EngineFailed(ProviderFailed):
    """A step of the model failed while this sequence was in it, or the engine stopped before its end."""


class PlanMissing(RuntimeFailure):
    """The recorded schedule has no trace of the sequence, or lacks a step of its slice."""

    bound_class = FailureClass.TELEMETRY_PERSISTENCE
