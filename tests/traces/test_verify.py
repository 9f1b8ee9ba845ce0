"""Verification finds every kind of damage and never cries wolf."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.traces.damage import DAMAGES, Damage, edit_body, reorder_events, truncate_segment
from traces.ledger.ledger import Ledger
from traces.recorder import Recorder

QUICK = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_a_clean_ledger_has_no_findings(copy: Path) -> None:
    report = Ledger(copy).verify()
    assert (report.findings, report.notes) == ([], [])
    assert (report.segments, report.events, report.rows, report.blobs) == (3, 42, 42, 9)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@QUICK
@given(where=st.integers(0, 10_000))
def test_damage_is_found(recorded: Path, damage: Damage, where: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ledger"
        shutil.copytree(recorded, target)
        shutil.copy(recorded.with_name("ledger.head"), Path(folder) / "ledger.head")
        damage(target, where)
        assert not Ledger(target).verify().ok


def test_a_finding_says_what_and_where(copy: Path) -> None:
    edit_body(copy, 4)
    finding = Ledger(copy).verify().findings[0]
    assert (finding.kind, finding.segment, finding.seq) == ("edited", 2, 19)
    reorder_events(copy, 0)
    truncate_segment(copy, 2)
    kinds = {finding.kind for finding in Ledger(copy).verify().findings}
    assert {"edited", "reordered", "truncated"} <= kinds


def test_without_a_witness_verification_says_what_it_cannot_know(copy: Path) -> None:
    copy.with_name("ledger.head").unlink()
    report = Ledger(copy).verify()
    assert report.ok
    assert any("witness" in note for note in report.notes)


def test_a_new_ledger_in_an_old_ones_place_is_no_alarm(copy: Path) -> None:
    shutil.rmtree(copy)
    with Recorder(copy, run_id="run_1", component="test") as recorder:
        recorder.commit("x")
    report = Ledger(copy).verify()
    assert report.ok
    assert any("another ledger" in note for note in report.notes)
    Ledger(copy).drain()
    assert Ledger(copy).verify().notes == []


actions = st.lists(
    st.one_of(
        st.tuples(st.just("emit"), st.integers(1, 40)),
        st.tuples(st.just("commit"), st.integers(1, 3)),
        st.tuples(st.just("blob"), st.integers(0, 5)),
        st.tuples(st.just("drain"), st.just(0)),
        st.tuples(st.just("second"), st.integers(1, 4)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("rebuild"), st.just(0)),
        st.tuples(st.just("compact"), st.just(0)),
    ),
    max_size=10,
)
texts = st.text(max_size=20) | st.sampled_from(["\x00", "é\ud7ff", '"quoted"', "a\nb"])


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(script=actions, text=texts)
def test_no_false_alarm(script: list[tuple[str, int]], text: str) -> None:
    """Whatever is recorded, drained, rebuilt and compacted in whatever order, an undamaged ledger verifies."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        ledger = Ledger(path)
        recorder = Recorder(path, run_id="run_1", component="test")
        recorder.commit("run.started")
        ledger.drain()
        for action, number in script:
            if action == "emit":
                for step in range(number):
                    recorder.emit("engine.step", step=step, payload={"message": text, text: [step, None, 0.5]})
            elif action == "commit":
                recorder.commit("x", error_type=text)
            elif action == "blob":
                recorder.commit("x", result_ref=recorder.put_blob(bytes(number)))
            elif action == "drain":
                ledger.drain()
            elif action == "second":
                with Recorder(path, run_id="run_0", component=text or "second") as second:
                    for step in range(number):
                        second.emit("y", step=step)
            elif action == "reopen":
                recorder.close()
                recorder = Recorder(path, run_id="run_1", component="test")
            elif action == "rebuild":
                ledger.rebuild()
            else:
                ledger.compact()
        recorder.close()
        assert ledger.verify().findings == []
        ledger.drain()
        assert (ledger.verify().findings, ledger.pending()) == ([], 0)
