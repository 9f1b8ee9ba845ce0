"""Every recorded field is a value that somebody was asked for, or an unknown with its reason; never a bare nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.backends.registry import BACKENDS
from runtime.prepare.answers import bare_answers
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.table import summarize
from traces.stages import PREPARATION_STAGES, Stage

FAST = ("eager", "onnxruntime", "inductor")
NAMES = [pytest.param(one.name, marks=() if one.name in FAST else pytest.mark.slow) for one in BACKENDS]


@pytest.mark.parametrize("backend", NAMES)
def test_no_field_of_nine_stages_is_a_bare_nothing(prepared: Callable[..., PreparedPackage], backend: str) -> None:
    reports = prepared(backend).reports
    assert [report.stage for report in reports] == [one.stage for one in PREPARATION_STAGES]
    for report in reports:
        assert bare_answers(report.stage, report.record) == [], report.stage.word
        assert summarize(report.stage, report.record), report.stage.word


def test_a_build_names_its_passes_with_times_and_its_provenance(prepared: Callable[..., PreparedPackage]) -> None:
    for backend in ("onnxruntime", "inductor"):
        made = prepared(backend)
        records = {report.stage: report.record for report in made.reports}
        passes = {entry["name"] for entry in records[Stage.OPTIMIZE]["pass_list"]}
        assert passes
        assert passes >= set(records[Stage.OPTIMIZE]["optimization_us"]["passes"])
        statement = records[Stage.PACKAGE]["build_provenance"]
        assert (statement["_type"], statement["predicateType"]) == (
            "https://in-toto.io/Statement/v1",
            "https://slsa.dev/provenance/v1",
        )
        assert statement["subject"][0]["digest"]["sha256"] == made.digest.removeprefix("sha256:")
        assert {one["name"] for one in statement["subject"][1:]} == set(made.manifest.files)
        named = [one["name"] for one in statement["predicate"]["runDetails"]["byproducts"]]
        assert [name.split()[0] for name in named] == [f"a0{number}" for number in range(1, 7)]
    levels = prepared("onnxruntime").reports[3].record["graph_after"]["by_level"]
    assert list(levels) == ["disable", "basic", "extended"]
    assert levels["extended"] == prepared("onnxruntime").reports[3].record["graph_after"]["nodes"]


@pytest.mark.parametrize(
    ("stage", "record", "bare"),
    [
        (Stage.LOWER, {"code_size_bytes": 0}, ["a06.code_size_bytes"]),
        (Stage.LOWER, {"tuning_record": {}}, ["a06.tuning_record"]),
        (Stage.LOAD, {"load_us": None, "readiness_state": ""}, ["a08.load_us", "a08.readiness_state"]),
        (Stage.LOAD, {"device_allocation_bytes": {"unknown": "no"}}, ["a08.device_allocation_bytes.unknown"]),
        (Stage.LOAD, {"device_allocation_bytes": {"unknown": "the processor has none of its own"}}, []),
        (Stage.PARTITION, {"fallback_node_count": 0, "transfer_edges": []}, []),
        (Stage.CAPTURE, {"warnings": [], "artifact_digest": ""}, ["a01.artifact_digest"]),
    ],
)
def test_the_rule_tells_an_answer_from_a_bare_nothing(stage: Stage, record: dict[str, object], bare: list[str]) -> None:
    assert bare_answers(stage, record) == bare
