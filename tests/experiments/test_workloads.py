"""A workload file gives exactly its requests, or one error that names the line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import WorkloadError
from experiments.support_desk import support_desk_workload
from experiments.trace_files import TraceScale, block_content, detect_layout, read_workload, spread_bins
from experiments.workloads import ActivatePackage, Workload, WorkloadRequest, read_jsonl, write_jsonl

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,512,8
"""


def _file(folder: Path, text: str, name: str = "load.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_written_workload_reads_back_equal(tmp_path: Path) -> None:
    items = (
        WorkloadRequest(at_us=0, tenant="acme", question="Où est mon colis ?", generation={"seed": 3}),
        ActivatePackage(at_us=5, route="default", package="bfloat16"),
        WorkloadRequest(
            at_us=9, tenant="globex", question="q", deadline_us=50, priority=2, conversation="c1", expect={"tool": "x"}
        ),
    )
    path = tmp_path / "load.jsonl"
    write_jsonl(path, items)
    assert read_jsonl(path).items == items


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"at_us": 0, "tenant": "a"}', "give either 'question' or 'prompt_tokens'"),
        ('{"at_us": -1, "tenant": "a", "question": "q"}', "'at_us' must be a whole number"),
        ('{"at_us": 1, "tenant": "a", "question": "q", "deadline_us": -5}', "from 1 to 3600000000, not -5"),
        ('{"at_us": 1, "tenant": "a", "question": "q", "deadline_us": 0}', "from 1 to 3600000000, not 0"),
        ('{"at_us": 1, "tenant": "a", "question": "q", "priority": 10}', "from 0 (first) to 9, not 10"),
        ('{"at_us": 1, "tenant": "a", "question": "q", "priority": true}', "from 0 (first) to 9, not True"),
        ('{"at_us": true, "tenant": "a", "question": "q"}', "'at_us' must be a whole number"),
        ('{"at_us": 0.5, "tenant": "a", "question": "q"}', "'at_us' must be a whole number"),
        ('{"at_us": 0, "tenant": "a", "question": "q", "colour": 1}', "unknown field 'colour'"),
        ('{"at_us": 0, "tenant": "a", "question": " "}', "'question' must be a string"),
        ('{"at_us": 0, "tenant": "a", "question": "q", "generation": {"heat": 1}}', "unknown generation field 'heat'"),
        ('{"at_us": 0, "tenant": "a", "tenant": "b", "question": "q"}', "'tenant' stands twice"),
        ('{"at_us": NaN, "tenant": "a", "question": "q"}', "NaN is not JSON"),
        ('{"at_us": 0, "control": "stop", "route": "r", "package": "p"}', "unknown control 'stop'"),
        ('{"at_us": 0, "control": "activate", "route": "r"}', "'package' is missing"),
        ('{"at_us": 0, "tenant": "a", "question": "q", "prompt_tokens": [1]}', "give either"),
        ('{"at_us": 0, "tenant": "a", "prompt_tokens": []}', "'prompt_tokens' must be a list"),
        ('{"at_us": 0, "tenant": "a", "prompt_tokens": [1, -1]}', "'prompt_tokens' must be a list"),
        ("[1]", "not an object"),
        ("{", "is not a JSON object"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: str, says: str) -> None:
    good = '{"at_us": 0, "tenant": "a", "question": "q"}'
    path = _file(tmp_path, f"{good}\n\n{line}\n")
    with pytest.raises(WorkloadError) as caught:
        read_jsonl(path)
    assert f"{path}:3: " in str(caught.value)
    assert says in str(caught.value)


def test_time_that_falls_back_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, "".join(f'{{"at_us": {t}, "tenant": "a", "question": "q"}}\n' for t in (5, 4)))
    with pytest.raises(WorkloadError, match=":2: at_us 4 is before the line above it"):
        read_jsonl(path)


@pytest.mark.parametrize(("text", "says"), [("", "is empty"), ("hello\n", "neither"), ("\n\n", "is empty")])
def test_a_file_of_no_known_layout_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        read_workload(_file(tmp_path, text))


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        read_jsonl(tmp_path / "bytes")


def test_limited_keeps_the_controls_before_the_last_kept_request() -> None:
    items = tuple(WorkloadRequest(at_us=i, tenant="a", question="q") for i in range(4))
    load = Workload(name="w", items=(*items[:2], ActivatePackage(at_us=2, route="r", package="p"), *items[2:]))
    assert [item.at_us for item in load.limited(3).items] == [0, 1, 2, 2]
    assert load.limited(2).items == items[:2]


def test_an_azure_trace_is_scaled_and_keeps_its_times(tmp_path: Path) -> None:
    path = _file(tmp_path, AZURE, "azure.csv")
    assert detect_layout(path) == "azure"
    load = read_workload(path, scale=TraceScale(prompt_tokens=96, tenants=("acme", "globex")))
    first, second = load.requests
    assert (first.at_us, second.at_us) == (0, 52_000)
    assert first.prompt_tokens is not None and len(first.prompt_tokens) == 96
    assert second.prompt_tokens is not None and len(second.prompt_tokens) == 16
    assert first.generation["max_tokens"] == 1
    assert "1 of 2 requests capped" in load.notes


@pytest.mark.parametrize("row", ["yesterday,1,1", "2023-11-16 18:17:03.9,x,1", "2023-11-16 18:17:03.9,1,-2"])
def test_a_bad_azure_row_is_refused_by_its_number(tmp_path: Path, row: str) -> None:
    with pytest.raises(WorkloadError, match=":4: "):
        read_workload(_file(tmp_path, AZURE + row + "\n", "azure.csv"))


def test_mooncake_requests_that_share_blocks_share_a_prefix(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1200, "output_length": 640, "hash_ids": [0, 1, 2]},
        {"timestamp": 0, "input_length": 1024, "output_length": 32, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 512, "output_length": 32, "hash_ids": [7]},
    ]
    path = _file(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = read_workload(path).requests
    long, short, other = ((request.prompt_tokens or ()) for request in (first, second, third))
    assert (len(long), len(short), len(other)) == (38, 32, 16)
    assert long[:32] == short
    assert short[:16] != other
    assert first.generation["max_tokens"] == 20
    assert [first.at_us, second.at_us, third.at_us] == [0, 1_500_000, 3_000_000]


def test_a_block_is_the_same_in_every_process() -> None:
    code = "from experiments.trace_files import block_content as b; print(b('mooncake:7', 12, token_range=(64, 512)))"
    environments = ({"PYTHONHASHSEED": seed} for seed in ("1", "2"))
    texts = {
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        for env in environments
    }
    assert texts == {str(block_content("mooncake:7", 12, token_range=(64, 512)))}


@given(st.lists(st.integers(0, 50), min_size=1).map(sorted))
def test_spread_arrivals_stay_in_order_and_before_the_next_stamp(times: list[int]) -> None:
    stamps = [time * 1000 for time in times]
    spread = spread_bins(stamps)
    assert spread == sorted(spread)
    assert all(before <= after for before, after in zip(stamps, spread, strict=True))
    later = {stamp: min((other for other in stamps if other > stamp), default=None) for stamp in stamps}
    assert all(later[a] is None or b < later[a] for a, b in zip(stamps, spread, strict=True))


def test_the_real_traces_load(tmp_path: Path) -> None:
    data = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the public traces are not here")
    assert len(read_workload(data / "azure_llm_2023_code.csv").requests) == 8819
    assert len(read_workload(data / "mooncake_synthetic.jsonl").requests) == 3993


def test_the_support_desk_asks_the_same_from_the_same_seed() -> None:
    first, second = support_desk_workload(4, 12), support_desk_workload(4, 12)
    assert first == second
    assert {request.tenant for request in first.requests} == {"aurora", "borealis"}
    again = support_desk_workload(4, 12, repeat_every=5, temperature=0.8).requests
    assert again[0].question == again[5].question == again[10].question
    assert again[0].generation == {"seed": 0, "temperature": 0.8}
