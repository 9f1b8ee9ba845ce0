"""How does one effect stand in the trace?  One `effect.performed` event, its arguments and outcome as evidence."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from manifests.canonical import canonical_bytes
from runtime.effects.door import EFFECT_EVENT, EffectKind, EffectOrigin, EffectRecorder, Phase, SideEffect


class EffectLog:
    """Writes effects into the trace and counts equal calls; shared by live and recorded effects."""

    def __init__(self, recorder: EffectRecorder, columns: Mapping[str, Any]) -> None:
        self._recorder = recorder
        self._columns = dict(columns)
        self._equal: Counter[tuple[str, str]] = Counter()

    def number(self, kind: EffectKind, arguments_digest: str) -> int:
        """Count this call among its equals, from 0."""
        key = (kind, arguments_digest)
        self._equal[key] += 1
        return self._equal[key] - 1

    def entry(
        self,
        call: tuple[EffectKind, bytes, str, int],
        *,
        phase: Phase,
        outcome: dict[str, Any] | None,
        origin: EffectOrigin,
        side_effect: SideEffect,
    ) -> dict[str, Any]:
        """Build the keyword arguments of one `effect.performed` event, its blobs stored."""
        kind, argument_bytes, arguments_digest, ordinal = call
        entry: dict[str, Any] = {
            **self._columns,
            "payload": {"kind": kind, "arguments_digest": arguments_digest, "ordinal": ordinal, "phase": phase},
            "effect_origin": origin,
            "side_effect": side_effect,
            "input_ref": self._recorder.put_blob(argument_bytes),
        }
        if outcome is not None:
            entry["result_ref"] = self._recorder.put_blob(canonical_bytes(outcome))
            error = outcome.get("error")
            entry["status"] = "ok" if error is None else "error"
            if error is not None:
                entry["failure_class"] = error["failure_class"]
                entry["error_type"] = error["error_type"]
                if error.get("ambiguous"):
                    entry["side_effect"] = "ambiguous"
        return entry

    def emit(self, entry: dict[str, Any]) -> None:
        """Record on the hot path."""
        self._recorder.emit(EFFECT_EVENT, **entry)

    async def commit(self, entry: dict[str, Any]) -> None:
        """Record durably; returns only when it is on disk, even if the caller is cancelled meanwhile."""
        written = asyncio.ensure_future(self._recorder.commit_async(EFFECT_EVENT, **entry))
        try:
            await asyncio.shield(written)
        except asyncio.CancelledError:
            await written
            raise
