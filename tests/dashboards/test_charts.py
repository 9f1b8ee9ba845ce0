"""The figures say what the rows say, in the house's colours."""

from __future__ import annotations

import pytest

from dashboards.charts import batch_occupancy, owned_by_stage, stage_deltas, stage_latency, token_margins, waterfall
from dashboards.parts import field_html, value_html
from dashboards.rows import LatencyRow, SpanRow, StepRow, TokenRow
from dashboards.theme import DIVERGED, GAP, STAGE_COLOURS, stage_colour, tint
from dashboards.words import UNKNOWN, count, duration, short_digest, short_id, signed_duration, stage_label
from traces.stages import Stage

SPANS = (
    SpanRow(stage="b05", label="5 Prefill", start_us=0, end_us=400, critical=((0, 300),)),
    SpanRow(stage="b06", label="6 Decode", start_us=300, end_us=900, critical=((300, 500), (700, 900))),
    SpanRow(stage="b07", label="7 Tooling", start_us=500, end_us=700, critical=((500, 700),), status="error"),
)


def test_every_stage_has_a_colour_of_its_own_in_its_track() -> None:
    for track in "AB":
        colours = [STAGE_COLOURS[stage] for stage in Stage if stage.track == track]
        assert len(set(colours)) == len(colours)
    assert DIVERGED not in STAGE_COLOURS.values()


def test_waterfall_strip_is_the_critical_path_and_sums_to_the_total() -> None:
    figure = waterfall(SPANS)
    strip = [bar for bar in figure.data if bar.y[0] == "critical path" and bar.marker.color != GAP]
    assert sum(bar.x[0] for bar in strip) == 900
    assert [bar.marker.color for bar in strip] == [stage_colour(code) for code in ("b05", "b06", "b06", "b07")]


def test_waterfall_outlines_a_failed_span_in_red() -> None:
    figure = waterfall(SPANS)
    (failed,) = [bar for bar in figure.data if bar.y[0] == "7 Tooling" and bar.text]
    assert failed.marker.line.color == DIVERGED


def test_repeated_spans_keep_rows_of_their_own() -> None:
    spans = [SpanRow(stage="b06", label="6 Decode", start_us=at, end_us=at + 5) for at in (0, 10)]
    assert {bar.y[0] for bar in waterfall(spans).data} == {"6 Decode #1", "6 Decode #2", "critical path"}


def test_occupancy_fades_the_steps_of_other_requests() -> None:
    steps = [
        StepRow(step=n, start_us=n * 10, duration_us=8, prefill_rows=1, decode_rows=2, padded_rows=4, own=n == 1)
        for n in range(3)
    ]
    prompt = next(iter(batch_occupancy(steps, capacity=4).data))
    assert list(prompt.marker.color) == [tint(stage_colour("b05"), share) for share in (0.28, 1.0, 0.28)]


def test_stage_deltas_compare_the_critical_path() -> None:
    slower = (*SPANS[:2], SpanRow(stage="b07", label="7 Tooling", start_us=500, end_us=700, critical=((500, 650),)))
    figure = stage_deltas(SPANS, slower)
    assert list(figure.data[0].text) == ["same", "same", "\N{MINUS SIGN}50 \N{GREEK SMALL LETTER MU}s"]
    assert owned_by_stage(SPANS) == {"b05": 300, "b06": 400, "b07": 200}


def test_margins_mark_the_first_difference_in_red() -> None:
    tokens = [
        TokenRow(index=n, token=n, text=None, logprob=-0.1, margin=1.0 + n, logits_digest=None, step=n)
        for n in range(4)
    ]
    figure = token_margins([("recorded", tokens)], diverged_at=2)
    assert figure.layout.shapes[0].line.color == DIVERGED
    assert figure.layout.shapes[0].x0 == 2


def test_latency_draws_the_median_and_the_95th_percentile() -> None:
    figure = stage_latency([LatencyRow(stage="b05", count=3, p50_us=1_000, p95_us=4_000, p99_us=5_000)])
    (bar,) = [trace for trace in figure.data if trace.type == "bar"]
    assert bar.x[0] == 1.0


@pytest.mark.parametrize("draw", [waterfall, stage_latency, batch_occupancy, lambda none: stage_deltas(none, none)])
def test_nothing_to_draw_is_an_error_and_no_empty_chart(draw: object) -> None:
    with pytest.raises(ValueError, match="needs"):
        draw([])  # type: ignore[operator]


def test_words_never_turn_absence_into_zero() -> None:
    assert duration(None) == signed_duration(None) == short_digest(None) == short_id(None) == UNKNOWN
    assert count(None, "request") == f"{UNKNOWN} requests"


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 \N{GREEK SMALL LETTER MU}s"), (12_400, "12.4 ms"), (840_000, "840 ms"), (1_272_000, "1.27 s")],
)
def test_durations_keep_three_digits(size: int, said: str) -> None:
    assert duration(size) == said


def test_names_are_short_and_whole_words() -> None:
    assert short_id("req_0192f0c1a2b37000a1b2c3d4e5f60718") == "req_\N{HORIZONTAL ELLIPSIS}e5f60718"
    assert short_digest("evidence://sha256/abcdef0123456789") == "abcdef01"
    assert stage_label("b05") == "5 Prefill"


def test_axis_of_some_seconds_counts_in_seconds() -> None:
    span = SpanRow(stage="a01", label="1 Capture", start_us=0, end_us=8_150_000)
    assert waterfall([span]).layout.xaxis.title.text.endswith("seconds")
    assert not waterfall([span]).layout.xaxis.title.text.endswith("milliseconds")


@pytest.mark.parametrize("low", [0.02, 0.4, 2.1, 6.5])
def test_margins_within_a_factor_of_three_have_two_ticks_or_more(low: float) -> None:
    tokens = [
        TokenRow(index=index, token=1, text=None, logprob=None, margin=margin, logits_digest=None, step=None)
        for index, margin in enumerate((low, low * 3))
    ]
    ticks = token_margins([("margin", tokens)]).layout.yaxis.tickvals
    assert sum(low <= tick <= low * 3 for tick in ticks) >= 2


def test_recorded_times_keep_their_unit() -> None:
    assert field_html("prefill_us", 27_443) == duration(27_443) == "27.4 ms"
    assert field_html("deadline_us", 1_795_540_625_000_000) == "2026-11-24 17:17:05 UTC"
    assert field_html("prefill_us", None) == value_html(None)
    assert field_html("prompt_tokens", 27_443) == "27,443"
