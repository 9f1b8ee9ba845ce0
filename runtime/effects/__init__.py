"""What does a run read from, or do to, the world outside its pins, and how is that answered again in a replay?

Everything that is not a pure function of the pins goes through `Effects.perform`: clock, ids, arrival, retrieval,
quota, health, identity, tool and provider calls, human decisions, memory. Live, an effect is performed and recorded.
In a replay it is answered from the record, matched by kind and canonical arguments, never by order alone: the n-th
equal call gets the n-th equal record. A call that was not recorded fails with the nearest recorded call and a diff.
A replay never performs a write.

Record of one effect (event `effect.performed`): payload kind, arguments_digest, ordinal, phase; input_ref the
arguments, result_ref the outcome document, `{"result": ...}` or `{"error": {...}}`. A write has two events: phase
`intended`, durable before the write acts, and phase `performed`, durable before its result is used.
"""

from runtime.effects.door import (
    EFFECT_EVENT,
    WRITES,
    Action,
    EffectKind,
    EffectOrigin,
    EffectRecorder,
    Effects,
    Phase,
    SideEffect,
    read_clock,
)
from runtime.effects.live import LiveEffects
from runtime.effects.recorded import RecordedEffects
from runtime.effects.records import Override, RecordedCall, recorded_calls

__all__ = [
    "EFFECT_EVENT",
    "WRITES",
    "Action",
    "EffectKind",
    "EffectOrigin",
    "EffectRecorder",
    "Effects",
    "LiveEffects",
    "Override",
    "Phase",
    "RecordedCall",
    "RecordedEffects",
    "SideEffect",
    "read_clock",
    "recorded_calls",
]
