"""Every backend behind the engine: concurrent requests are answered, and each replays bit for bit from its slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from manifests.scheduling import SchedulingManifest
from runtime.engine.playback import PlanPlayer
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore
from tests.runtime.engine.recorded import record, requests_with_shared_prefixes

SCHEDULING = SchedulingManifest(
    max_num_seqs=8, max_num_batched_tokens=48, num_blocks=40, batch_sizes=(1, 2, 4, 8), watermark="0.02"
)


@pytest.mark.parametrize("backend", ["executorch", "iree"])
def test_concurrent_requests_are_served_and_replay_exactly(
    prepared: Callable[..., PreparedPackage], store: PackageStore, backend: str
) -> None:
    model: Any = load_package(store, prepared(backend, "float32").digest)
    requests = requests_with_shared_prefixes(12, seed=7, vocab_size=256, longest_output=14, stop=258)
    recording = record(model, SCHEDULING, requests)
    assert max(len(call.rows) for plan in recording.plans for call in plan.calls) > 2, "rows of requests share calls"
    assert sum(len(result.tokens) for result in recording.results) > 40
    player = PlanPlayer(model.executor, model.tokenizer, SCHEDULING, recording.plans, recording.sequences)
    for request, result in zip(recording.requests, recording.results, strict=True):
        assert player.play(request, "faithful", result).result.document() == result.document()
