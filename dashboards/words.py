"""How is a number, a digest or a term said on a page?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from traces.stages import Stage, describe

UNKNOWN = "\N{EN DASH}"
"""What stands where nothing was recorded: never a zero."""

FAILED = "\N{HEAVY BALLOT X}"
"""Stands before what failed, so that it is seen without its colour."""

GLOSSARY: Mapping[str, str] = MappingProxyType(
    {
        "critical path": "At each moment the stage that started last owns the time. The owned parts add up to the "
        "end-to-end time exactly, while plain durations overlap and add up to more.",
        "verdict": "What a replay said about this request: exact means that every logits row had the same bits.",
        "pins": "Everything the answer depended on, in eight documents named by their content. Two requests can differ "
        "only where a digest differs.",
        "margin": "The distance between the two best logits. A small margin means that a tiny numerical change can "
        "turn this token into another one.",
        "log-probability": "Natural logarithm of the probability that the model gave to the chosen token.",
        "bits": "A digest of the whole logits row. Bits usually part many steps before tokens do.",
        "slice": "The engine steps that computed this request's own tokens, and the shared prefix blocks it read. Only "
        "these run again in a replay.",
        "occupancy": "Rows of the batch that did useful work. Rows of other requests are counted, never shown.",
        "evidence": "A document kept by the digest of its content. It is read back only if the digest still fits.",
        "queue": "From admission until the first engine step that ran a token of this request.",
        "TTFT": "Time to first token: from acceptance to the first generated token.",
    }
)
"""Term to the sentence that explains it."""


def duration(microseconds: int | float | None) -> str:
    """Say a time with three meaningful digits: ``840 \N{GREEK SMALL LETTER MU}s``, ``12.4 ms``, ``1.27 s``."""
    if microseconds is None:
        return UNKNOWN
    size = abs(microseconds)
    if size < 1_000:
        return f"{microseconds:.0f} \N{GREEK SMALL LETTER MU}s"
    if size < 1_000_000:
        return f"{microseconds / 1_000:.{2 if size < 10_000 else 1 if size < 100_000 else 0}f} ms"
    return f"{microseconds / 1_000_000:.{2 if size < 10_000_000 else 1}f} s"


def signed_duration(microseconds: int | float | None) -> str:
    """Say a difference of times with its sign; ``same`` for none."""
    if microseconds is None:
        return UNKNOWN
    if microseconds == 0:
        return "same"
    return ("+" if microseconds > 0 else "\N{MINUS SIGN}") + duration(abs(microseconds))


def short_digest(digest: str | None, length: int = 8) -> str:
    """Shorten ``sha256:<hex>`` or an evidence reference to its first characters."""
    if not digest:
        return UNKNOWN
    return digest.rsplit(":", 1)[-1].rsplit("/", 1)[-1][:length]


def short_id(identifier: str | None) -> str:
    """Shorten ``req_<uuid7 hex>``: kind and the last eight characters, which are the random ones."""
    if not identifier:
        return UNKNOWN
    kind, separator, rest = identifier.partition("_")
    if not separator or len(rest) <= 12:
        return identifier
    return f"{kind}_\N{HORIZONTAL ELLIPSIS}{rest[-8:]}"


def moment(epoch_us: int | None) -> str:
    """Say a point in time, UTC, to the second."""
    if epoch_us is None:
        return UNKNOWN
    return datetime.fromtimestamp(epoch_us / 1_000_000, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def count(number: int | None, noun: str) -> str:
    """Say how many: ``1 request``, ``1,204 requests``, ``no requests``."""
    if number is None:
        return f"{UNKNOWN} {noun}s"
    if number == 0:
        return f"no {noun}s"
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def stage_label(code: str) -> str:
    """Say a stage by its number and word: ``5 Prefill``; other text is returned as it is."""
    try:
        stage = Stage(code)
    except ValueError:
        return code
    return f"{stage.number} {stage.word.capitalize()}"


def stage_title(code: str) -> str:
    """Return the specification's heading of a stage; other text is returned as it is."""
    try:
        return describe(Stage(code)).title
    except ValueError:
        return code


def field_label(name: str) -> str:
    """Say a record field in words: ``redaction_status`` becomes ``redaction status``; units stay readable."""
    return name.removesuffix("_us").removesuffix("_ref").replace("_", " ")
