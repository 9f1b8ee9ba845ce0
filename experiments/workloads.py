"""Which requests arrive, when, and from whom?

A workload is a JSON Lines file.  A line is a request or a control:

    {"at_us": 120000, "tenant": "acme", "question": "Where is my refund?", "generation": {"seed": 7}}
    {"at_us": 500000, "control": "activate", "route": "default", "package": "bfloat16"}

A request asks a question of the support desk, or gives `"prompt_tokens": [..]` to be continued as they are.
Times are integer microseconds from the start of the workload and never fall from line to line.  Trace files of
other systems (Azure, Mooncake) are read by `experiments.trace_files` into the same records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from experiments.errors import WorkloadError

WorkloadFormat = Literal["auto", "jsonl", "azure", "mooncake"]
FORMATS: tuple[WorkloadFormat, ...] = ("auto", "jsonl", "azure", "mooncake")

REQUEST_FIELDS = frozenset(
    {
        "at_us",
        "tenant",
        "question",
        "prompt_tokens",
        "conversation",
        "route",
        "deadline_us",
        "priority",
        "generation",
        "expect",
    }
)
CONTROL_FIELDS = frozenset({"at_us", "control", "route", "package"})
GENERATION_FIELDS = frozenset({"seed", "temperature", "top_k", "top_p", "max_tokens"})

LOWEST_PRIORITY = 9
"""The largest priority number of a request envelope: least is first."""

LONGEST_US = 3_600_000_000
"""An hour: the longest deadline that a request envelope takes."""


@dataclass(frozen=True, kw_only=True)
class WorkloadRequest:
    """One request as it arrives.

    at_us          arrival, microseconds after the start of the workload
    tenant         whose request it is: a tenant of the deployment
    question       what the customer asks; None when the prompt is given as tokens
    prompt_tokens  token ids to continue, without retrieval, tools or grammar
    conversation   the conversation it continues, if any
    route          the route it asks for; None takes the deployment's default
    deadline_us    microseconds after arrival at which the answer is of no use; None for the deployment's limit
    priority       0 to 9, least first, under the scheduling policy `priority`; None for the envelope's default, 0
    generation     sampling fields by name; what is left out is the deployment's default
    expect         what a right answer contains, for quality only: never sent to the runtime
    """

    at_us: int
    tenant: str
    question: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    conversation: str | None = None
    route: str | None = None
    deadline_us: int | None = None
    priority: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    expect: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """Return the line of the workload file that says this request."""
        line: dict[str, Any] = {"at_us": self.at_us, "tenant": self.tenant}
        for name in ("question", "prompt_tokens", "conversation", "route", "deadline_us", "priority", "expect"):
            if getattr(self, name) is not None:
                line[name] = getattr(self, name)
        if self.generation:
            line["generation"] = dict(self.generation)
        return line


@dataclass(frozen=True, kw_only=True)
class ActivatePackage:
    """From `at_us` on, `route` is served by `package` (a digest or an alias)."""

    at_us: int
    route: str
    package: str

    def document(self) -> dict[str, Any]:
        """Return the line of the workload file that says this control."""
        return {"at_us": self.at_us, "control": "activate", "route": self.route, "package": self.package}


WorkloadItem = WorkloadRequest | ActivatePackage


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests and controls in order of time, and what the reader did to make them."""

    name: str
    items: tuple[WorkloadItem, ...]
    notes: tuple[str, ...] = ()

    @property
    def requests(self) -> tuple[WorkloadRequest, ...]:
        """The requests alone, in order of arrival."""
        return tuple(item for item in self.items if isinstance(item, WorkloadRequest))

    def limited(self, limit: int | None) -> Workload:
        """Keep the first `limit` requests and the controls that come before the last of them."""
        if limit is None or len(self.requests) <= limit:
            return self
        kept: list[WorkloadItem] = []
        left = limit
        for item in self.items:
            if left == 0:
                break
            kept.append(item)
            left -= isinstance(item, WorkloadRequest)
        return Workload(name=self.name, items=tuple(kept), notes=self.notes)


def read_jsonl(path: Path) -> Workload:
    """Read a workload file; WorkloadError names the first bad line."""
    items = tuple(_parse_line(path, number, text) for number, text in numbered_lines(path))
    if not any(isinstance(item, WorkloadRequest) for item in items):
        raise WorkloadError(
            "has no request", path=path, fix='Add a line such as {"at_us": 0, "tenant": ..., "question": ...}.'
        )
    previous = 0
    for (number, _), item in zip(numbered_lines(path), items, strict=True):
        if item.at_us < previous:
            raise WorkloadError(
                f"at_us {item.at_us} is before the line above it ({previous})",
                path=path,
                line=number,
                fix="Sort the lines by at_us.",
            )
        previous = item.at_us
    return Workload(name=path.stem, items=items)


def write_jsonl(path: Path, items: Iterable[WorkloadItem]) -> None:
    """Write a workload file, one item a line, in order of time."""
    ordered = sorted(items, key=lambda item: item.at_us)
    path.write_text(
        "".join(json.dumps(item.document(), ensure_ascii=False) + "\n" for item in ordered), encoding="utf-8"
    )


def read_text(path: Path) -> str:
    """Return the file's text; WorkloadError when it is missing, a folder or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise WorkloadError("no such file", path=path, fix="Check the path of the workload.") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"is not UTF-8 text ({error.reason} at byte {error.start})", path=path) from None
    except OSError as error:
        raise WorkloadError(f"cannot be read: {error.strerror}", path=path) from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of every line that is not blank."""
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        if text.strip():
            yield number, text


def parse_object(path: Path, number: int, text: str) -> dict[str, Any]:
    """Return the JSON object that a line holds; duplicate keys and NaN are refused."""
    try:
        value: object = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except ValueError as error:
        raise WorkloadError(f"is not a JSON object: {error}", path=path, line=number) from None
    if not isinstance(value, dict):
        raise WorkloadError("is JSON, but not an object", path=path, line=number)
    return cast(dict[str, Any], value)


def _parse_line(path: Path, number: int, text: str) -> WorkloadItem:
    """Return the request or control of one line."""
    line = parse_object(path, number, text)
    control = "control" in line
    known = CONTROL_FIELDS if control else REQUEST_FIELDS
    unknown = sorted(set(line) - known)
    if unknown:
        raise WorkloadError(
            f"unknown field {unknown[0]!r}", path=path, line=number, fix=f"Known fields: {', '.join(sorted(known))}."
        )
    needs = ("at_us", "route", "package") if control else ("at_us", "tenant")
    for name in needs:
        if name not in line:
            raise WorkloadError(f"field {name!r} is missing", path=path, line=number)
    _check_times(path, number, line)
    for name in ("tenant", "question", "conversation", "route", "package", "control"):
        if name in line and (not isinstance(line[name], str) or not line[name].strip()):
            raise WorkloadError(f"{name!r} must be a string that is not empty", path=path, line=number)
    if control:
        if line["control"] != "activate":
            raise WorkloadError(f"unknown control {line['control']!r}", path=path, line=number, fix="Use activate.")
        return ActivatePackage(at_us=line["at_us"], route=line["route"], package=line["package"])
    _check_mappings(path, number, line)
    _check_prompt(path, number, line)
    priority = line.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= LOWEST_PRIORITY:
        message = f"'priority' must be a whole number from 0 (first) to {LOWEST_PRIORITY}, not {priority!r}"
        raise WorkloadError(message, path=path, line=number)
    if "prompt_tokens" in line:
        line["prompt_tokens"] = tuple(line["prompt_tokens"])
    return WorkloadRequest(**line)


def _check_times(path: Path, number: int, line: Mapping[str, Any]) -> None:
    """Refuse times that are not whole microseconds: arrivals from 0 up, deadlines as a request may have."""
    for name, (least, most) in {"at_us": (0, 2**53 - 1), "deadline_us": (1, LONGEST_US)}.items():
        value = line.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise WorkloadError(
                f"{name!r} must be a whole number of microseconds from {least} to {most}, not {value!r}",
                path=path,
                line=number,
            )


def _check_mappings(path: Path, number: int, line: Mapping[str, Any]) -> None:
    """Refuse generation and expect fields of the wrong kind or name."""
    for name in ("generation", "expect"):
        if name in line and not isinstance(line[name], dict):
            raise WorkloadError(f"{name!r} must be an object", path=path, line=number)
    unknown = sorted(set(cast(Mapping[str, Any], line.get("generation", {}))) - GENERATION_FIELDS)
    if unknown:
        raise WorkloadError(
            f"unknown generation field {unknown[0]!r}",
            path=path,
            line=number,
            fix=f"Known fields: {', '.join(sorted(GENERATION_FIELDS))}.",
        )


def _check_prompt(path: Path, number: int, line: Mapping[str, Any]) -> None:
    """Refuse a request that asks nothing, asks twice, or whose tokens are no token ids."""
    if ("question" in line) == ("prompt_tokens" in line):
        raise WorkloadError("give either 'question' or 'prompt_tokens'", path=path, line=number)
    tokens: object = line.get("prompt_tokens", [0])
    whole = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in cast(list[object], tokens))
    if not whole or not tokens:
        raise WorkloadError("'prompt_tokens' must be a list of token ids that is not empty", path=path, line=number)


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key that stands twice."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r} stands twice")
        seen[key] = value
    return seen


def _no_constant(name: str) -> Any:
    """Refuse NaN and the infinities, which JSON does not have."""
    raise ValueError(f"{name} is not JSON")
