"""How is an effect performed for real?  Recorded always; a write durable before it acts and before it is used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from manifests.canonical import canonical_bytes, digest
from runtime.effects.door import WRITES, Action, EffectKind, EffectRecorder, Phase, SideEffect
from runtime.effects.log import EffectLog
from runtime.effects.outcomes import ambiguous_write, answer_of, cancelled_call, outcome_of


class LiveEffects:
    """Performs effects and records them; writes are durable before they act and before their result is used."""

    def __init__(self, recorder: EffectRecorder, *, columns: Mapping[str, Any]) -> None:
        """Bind to one request: `columns` are the envelope columns (request_ref, trace_id, tenant_ref, ...)."""
        self._log = EffectLog(recorder, columns)

    async def perform(
        self, kind: EffectKind, arguments: dict[str, Any], action: Action, *, side_effect: SideEffect = "none"
    ) -> Any:
        """Perform `action` and record it; raises what it raises, classified.

        Raises TelemetryPersistenceError before a write acts when its intent cannot be stored.
        """
        argument_bytes = canonical_bytes(arguments)
        arguments_digest = digest(argument_bytes)
        call = (kind, argument_bytes, arguments_digest, self._log.number(kind, arguments_digest))
        write = side_effect in WRITES
        began = time.monotonic_ns()

        def entry(phase: Phase, outcome: dict[str, Any] | None) -> dict[str, Any]:
            fields = self._log.entry(call, phase=phase, outcome=outcome, origin="executed", side_effect=side_effect)
            if phase == "performed":
                fields["duration_us"] = (time.monotonic_ns() - began) // 1_000
            return fields

        if write:
            await self._log.commit(entry("intended", None))
        try:
            outcome = await outcome_of(kind, action, write=write)
        except asyncio.CancelledError:
            cancelled = ambiguous_write(kind, "cancelled") if write else cancelled_call(kind)
            if write:
                await self._log.commit(entry("performed", {"error": cancelled}))
            else:
                self._log.emit(entry("performed", {"error": cancelled}))
            raise
        if write:
            await self._log.commit(entry("performed", outcome))
        else:
            self._log.emit(entry("performed", outcome))
        return answer_of(outcome)
