"""The named edit parts the output, agrees with trying every edit, and repeats; where nothing does, nothing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from replay.blame import Search, Unresolved, evidence, parting
from replay.errors import ReplayFailed
from runtime.engine.edited_replays import EditedReplays
from runtime.engine.generation import GenerationRequest, Sampling
from runtime.engine.plan_edits import edit_path
from runtime.models.random_checkpoint import random_checkpoint
from tests.runtime.engine.recorded import Recording
from tests.runtime.engine.stepped import record_steps
from tests.runtime.engine.test_plan_edits import ROOMY, TIGHT, recording_of, replays_of
from tests.runtime.engine.toy import ToyModel


def searched(replays: EditedReplays, recording: Recording, number: int, *, max_replays: int = 100) -> Any:
    """Search one request of a recording."""
    return Search(replays, recording.results[number].records, max_replays=max_replays).run()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random decoder."""
    return random_checkpoint(
        tmp_path_factory.mktemp("blame") / "model", vocab_size=320, hidden_size=64, intermediate_size=128,
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> ToyModel:
    """It on eager float32, whose bits depend on the batch."""
    from runtime.backends.eager import EagerExecutor

    return ToyModel(EagerExecutor.from_checkpoint(checkpoint, precision="float32"))


def plain(number: int, *, prompt: int = 20, tokens: int = 16, tenant: str = "tenant") -> GenerationRequest:
    """A greedy request with a prompt of its own."""
    words = tuple((number * 37 + place * 11) % 250 + 1 for place in range(prompt))
    return GenerationRequest(f"sequence-{number}", tenant, words, Sampling(max_tokens=tokens))


@pytest.mark.parametrize("seed", range(3))
def test_the_culprit_is_one_that_trying_every_edit_finds(seed: int) -> None:
    """All plans of a path are run: the search names one of the edits at which the output parts, in few replays."""
    scheduling = (TIGHT, ROOMY)[seed % 2]
    recording = recording_of(seed, scheduling)
    searches = 0
    for number, result in enumerate(recording.results):
        if len(result.tokens) < 4:
            continue
        found = searched(replays_of(recording, number, scheduling), recording, number)
        replays = replays_of(recording, number, scheduling)
        for culprit in found.findings:
            searches += 1
            wanted = culprit.token_index + 1
            plan = replays.recorded_plan(wanted)
            states = [parting(culprit.layer, result.records[:wanted], replays.outcome(plan, wanted)) is not None]
            path = []
            for change in edit_path(plan):
                path.append(change.edit)
                outcome = replays.outcome(plan, wanted)
                states.append(parting(culprit.layer, result.records[:wanted], outcome) is not None)
            turns = [place for place in range(len(path)) if states[place + 1] and not states[place]]
            assert culprit.edits_before in turns
            assert path[culprit.edits_before] == culprit.change.edit
            assert culprit.repeated
        if not found.findings:
            assert evidence(replays.alone(len(result.tokens))) == evidence(result.records)
        assert found.replays <= 8 + 3 * found.edits.bit_length()
    assert searches > 4


def test_a_request_that_joins_half_way_is_named_at_the_step_it_joined(eager: ToyModel) -> None:
    """Planted: on eager float32 the first one decodes alone until another comes; that one's row is to blame."""
    recording = record_steps(eager, ROOMY, [plain(0), plain(1, tokens=4)], [0, 6])
    found = searched(replays_of(recording, 0, ROOMY, eager), recording, 0)
    joined = recording.results[1].steps[1]  # its prefill is a call of its own; then it decodes with the first
    (culprit,) = found.findings
    assert (culprit.layer, culprit.step) == ("bits", joined)
    assert culprit.change.edit.kind == "neighbour"
    assert (culprit.change.edit.sequence, culprit.change.edit.step) == (1, joined)
    assert (culprit.change.before.batch, culprit.change.after.batch) == (2, 1)
    assert culprit.by_itself
    assert culprit.repeated
    assert found.replays <= 10


def test_a_neighbour_s_longer_context_is_named(eager: ToyModel) -> None:
    """Two rows either way to the pad: with batches of two only, it is the padded context that reaches the bits."""
    pairs = ROOMY.model_copy(update={"batch_sizes": (8,)})
    recording = record_steps(eager, pairs, [plain(0), plain(1, prompt=60, tokens=20)], [0, 0])
    found = searched(replays_of(recording, 0, pairs, eager), recording, 0)
    if found.findings:  # a kernel may be invariant to it on some machine
        (culprit,) = found.findings
        assert culprit.change.before.context > culprit.change.after.context
        assert culprit.change.before.batch == culprit.change.after.batch


def test_a_prefix_hit_and_a_preemption_are_named(eager: ToyModel) -> None:
    """The second of two equal prompts reads the first one's blocks; a small pool makes somebody be recomputed."""
    twice = [plain(0, prompt=49), msgspec.structs.replace(plain(0, prompt=49), sequence_id="sequence-1")]
    recording = record_steps(eager, ROOMY, twice, [0, 40])
    assert recording.results[1].cached_tokens == 48
    (culprit,) = searched(replays_of(recording, 1, ROOMY, eager), recording, 1).findings
    assert (culprit.change.edit.kind, culprit.token_index) == ("prefix_hit", 0)

    small = ROOMY.model_copy(update={"num_blocks": 6, "batch_sizes": (8,), "enable_prefix_caching": False})
    recording = record_steps(eager, small, [plain(0, prompt=30, tokens=40), plain(1, prompt=30, tokens=30)], [0, 0])
    assert recording.results[1].preemptions == 1
    found = searched(replays_of(recording, 1, small, eager), recording, 1)
    (culprit,) = found.findings
    assert culprit.change.edit.kind == "preemption"
    again = recording.results[1].steps
    assert culprit.step == culprit.change.edit.step > again[0]


def test_a_search_that_runs_out_of_replays_says_between_which_steps_it_stands() -> None:
    recording = recording_of(5, TIGHT)
    for number in range(len(recording.results)):
        found = searched(replays_of(recording, number, TIGHT), recording, number, max_replays=4)
        for one in found.findings:
            if isinstance(one, Unresolved):
                assert one.first_step <= one.last_step
                assert one.edits_left >= 1
                assert found.replays <= 4
                return
    pytest.fail("no search was cut short")


def test_a_plan_that_does_not_give_the_recorded_bits_blames_nobody() -> None:
    recording = recording_of(1, ROOMY)
    number = next(place for place, result in enumerate(recording.results) if result.tokens)
    wrong = [msgspec.structs.replace(record, logits_digest="0" * 32) for record in recording.results[number].records]
    with pytest.raises(ReplayFailed, match="does not give the recorded bits"):
        Search(replays_of(recording, number, ROOMY), wrong, max_replays=9).run()


@pytest.mark.slow
def test_onnx_runtime_with_whole_prefills_has_nothing_to_blame(checkpoint: Path, tmp_path: Path) -> None:
    """Its linear layers do not look at the batch: a busy engine and an idle one give the same bits."""
    from runtime.backends.protocol import BuildOptions
    from runtime.prepare.load import load_package
    from runtime.prepare.pipeline import prepare
    from runtime.prepare.store import PackageStore

    store = PackageStore(tmp_path)
    package = prepare(checkpoint, backend="onnxruntime", store=store, options=BuildOptions())
    loaded = load_package(store, package.digest)
    model = ToyModel(loaded.executor)
    requests = [plain(number, prompt=20 + number, tokens=8) for number in range(6)]
    recording = record_steps(model, ROOMY, requests, [0, 1, 2, 3, 3, 7])
    for number in range(6):
        found = searched(replays_of(recording, number, ROOMY, model), recording, number)
        assert found.edits > 5
        assert found.findings == ()
        assert found.replays == 2
