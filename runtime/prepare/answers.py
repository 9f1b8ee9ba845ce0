"""Is a recorded nothing an answer?  Zero, "" and [] may stand only where a toolchain was asked and said so.

What a toolchain cannot tell is {"unknown": reason}.  The table below holds every field in which nothing is an answer,
and what it then means; anywhere else a bare nothing is a field that nobody asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from traces.stages import Stage

LEAST_REASON = 10
"""Characters that the reason of an unknown has at least."""

NOTHING_IS_AN_ANSWER: Mapping[str, str] = {
    r"a01\.warnings": "the exporters warned of nothing",
    r"a01\.unsupported_nodes": "every node was looked up and found",
    r"a02\.control_flow_inventory": "every node was looked at; none branches or loops",
    r"a02\.node_count\..+": "counted",
    r"a02\.model_signature\..+\.shape": "a scalar has no dimensions",
    r"a03\.guard_count": "the program's guards were counted",
    r"a03\.dynamic_dimensions\..+": "all dimensions of this input are fixed",
    r"a04\.pass_list": "the backend runs no pass",
    r"a04\.pass_list\[\d+\]\..+": "what one pass did",
    r"a05\.fallback_node_count": "every node was assigned, none to a fallback",
    r"a05\.transfer_edges": "the assigned graph was walked; no tensor changes its owner",
    r"a05\.estimated_copy_bytes": "no tensor changes its owner, so nothing is copied",
    r"a05\.partition_map\..+": "an owner was asked for its nodes",
    r"a06\.compiler_flags\..+": "a setting as it is, 0 and empty included",
    r"a06\.kernel_inventory\..+": "the artifact was searched for it",
    r"a07\.build_provenance\..+": "options as they were given",
    r"a08\.device_allocation_bytes\..+_bytes_.+": "the allocator counted nothing: weights are mapped, no call was made",
    r"a09\.compilation_cache_events\..+": "events were counted while warming",
}


def bare_answers(stage: Stage, record: Mapping[str, Any]) -> list[str]:
    """Name the fields of a stage's record that say nothing without being an answer; empty where all is well."""
    return [
        path
        for path, value in _leaves(stage.value, record)
        if _is_nothing(path, value) and not any(re.fullmatch(known, path) for known in NOTHING_IS_AN_ANSWER)
    ]


def _is_nothing(path: str, value: Any) -> bool:
    if path.endswith(".unknown"):
        return not isinstance(value, str) or len(value) < LEAST_REASON
    return value is None or (not isinstance(value, bool) and value in (0, "", [], {}, ()))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, entry in cast("Mapping[str, Any]", value).items():
            yield from _leaves(f"{path}.{name}", entry)
    elif isinstance(value, (list, tuple)) and value:
        for place, entry in enumerate(cast("list[Any]", value)):
            yield from _leaves(f"{path}[{place}]", entry)
    else:
        yield path, value
