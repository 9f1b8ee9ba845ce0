"""What does a chart draw?  Plain records between the recorded events and the figures.

Times are integer microseconds.  Those of spans are counted from the moment the request was accepted, those of engine
steps from the first step shown.
"""

from __future__ import annotations

from dataclasses import dataclass

Interval = tuple[int, int]
"""Start and end in microseconds."""


@dataclass(frozen=True, kw_only=True)
class SpanRow:
    """One bar of the waterfall."""

    stage: str
    """Stage code, such as ``b05``."""
    label: str
    start_us: int
    end_us: int
    critical: tuple[Interval, ...] = ()
    """The parts of the span that the critical path goes through."""
    status: str = "ok"
    detail: str = ""
    """One sentence for the hover."""

    @property
    def duration_us(self) -> int:
        """Inclusive time."""
        return self.end_us - self.start_us

    @property
    def critical_us(self) -> int:
        """Time that the critical path spends in this span."""
        return sum(end - start for start, end in self.critical)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One engine step."""

    step: int
    start_us: int
    duration_us: int
    prefill_rows: int
    decode_rows: int
    padded_rows: int
    """Rows of the batch after padding: what the kernels saw."""
    prefill_tokens: int = 0
    own: bool = False
    """The request that is looked at has a row in this step."""

    @property
    def rows(self) -> int:
        """Rows that did useful work."""
        return self.prefill_rows + self.decode_rows


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """How long one stage took over many requests."""

    stage: str
    count: int
    p50_us: float
    p95_us: float
    p99_us: float


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One generated token and the evidence beside it."""

    index: int
    token: int
    text: str | None
    """None when the package's tokenizer is not at hand."""
    logprob: float | None
    margin: float | None
    logits_digest: str | None
    step: int | None
    emitted_us: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in the list of runs."""

    run_id: str
    kind: str
    """``live``, ``inference``, ``replay`` or ``preparation``."""
    name: str
    """What was run, in words."""
    started_us: int
    """UTC epoch."""
    duration_us: int | None
    """None while no end is recorded."""
    requests: int
    failed: int
    p50_us: float | None = None
    """Median end-to-end time of its requests."""
    p95_us: float | None = None
    parent_run: str | None = None
    mode: str | None = None
    outcome: str = "ok"
    """Verdicts counted for a replay; otherwise how the run itself ended, whatever became of single requests."""
    package: str | None = None
    """What a preparation made, or what answered an inference."""
    message: str | None = None
    """What a run that ended in an error said, and what to do."""


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """One request in the list of a run."""

    run_id: str
    request_ref: str
    accepted_us: int
    """UTC epoch."""
    status: str
    tenant_ref: str | None = None
    route: str | None = None
    failure_class: str | None = None
    total_us: int | None = None
    first_token_us: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    manifest_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """What one replay said about one request."""

    run_id: str
    """The replay's own run."""
    request_ref: str | None
    """None for a verdict on a whole run: a preparation that was rebuilt."""
    verdict: str
    mode: str | None = None
    changed: tuple[str, ...] = ()
    """Pins that the replay was told to change."""
    layer: str | None = None
    stage: str | None = None
    token_index: int | None = None
    detail: str = ""
    at_us: int = 0
    kept: bool = True
    """Whether the replay kept what it computed, so that it can be compared; that of a one-shot request does not."""
