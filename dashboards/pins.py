"""What was pinned, in words, and where do two sets of pins part?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dashboards.words import UNKNOWN, short_digest
from manifests.diff import PinDifference, diff
from manifests.errors import ManifestError
from manifests.run import DIMENSIONS, MANIFESTS, Pins

Documents = Mapping[str, Mapping[str, Any]]

QUESTIONS: Mapping[str, str] = MappingProxyType(
    {
        "artifact": "which weights, tokenizer and package",
        "compiler": "which backend, precision and flags",
        "hardware": "which machine, threads and libraries",
        "scheduling": "which batching and cache rules",
        "generation": "which seed, sampler and limits",
        "context": "which index, sources and budget",
        "tools": "which server and tool schemas",
        "policy": "which validators and thresholds",
    }
)
"""Dimension to the question that it answers."""

_SUMMARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "artifact": ("model", "quantization", "package_digest"),
        "compiler": ("backend", "backend_version", "precision"),
        "hardware": ("cpu_model", "threads", "architecture"),
        "scheduling": ("policy", "max_num_seqs", "max_num_batched_tokens"),
        "generation": ("sampler", "temperature", "seed", "max_tokens"),
        "context": ("ranking", "token_budget", "index_digest"),
        "tools": ("server", "server_version", "protocol_version"),
        "policy": ("policy_version", "repair_limit"),
    }
)
_BARE = frozenset({"model", "quantization", "backend", "precision", "cpu_model", "architecture", "server", "policy"})
"""Fields whose value says enough without their name."""


@dataclass(frozen=True, kw_only=True)
class DimensionView:
    """One of the eight dimensions, ready to be shown."""

    name: str
    question: str
    digest: str | None
    """None when the document does not fit this version of the manifest."""
    summary: str
    document: Mapping[str, Any]


def dimension_views(documents: Documents) -> tuple[DimensionView, ...]:
    """Return the eight dimensions in their order; those that were not recorded are left out."""
    return tuple(
        DimensionView(
            name=name,
            question=QUESTIONS[name],
            digest=_digest_of(name, documents[name]),
            summary=_summary(name, documents[name]),
            document={field: value for field, value in documents[name].items() if field != "document"},
        )
        for name in DIMENSIONS
        if name in documents
    )


def differences(left: Documents, right: Documents) -> tuple[PinDifference, ...]:
    """Return every pin that differs, to the field; documents of an older version are compared as plain JSON."""
    try:
        return diff(Pins.from_documents(left), Pins.from_documents(right))
    except ManifestError:
        return tuple(
            PinDifference(name, field, left.get(name, {}).get(field), right.get(name, {}).get(field))
            for name in DIMENSIONS
            for field in sorted({*left.get(name, {}), *right.get(name, {})})
            if left.get(name, {}).get(field) != right.get(name, {}).get(field)
        )


def say(value: Any, shorten: Callable[[str], str] = short_digest) -> str:
    """Say a pin's value in a few characters."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return shorten(text) if text.startswith(("sha256:", "evidence://")) else text


def _digest_of(name: str, document: Mapping[str, Any]) -> str | None:
    try:
        return MANIFESTS[name].from_document(dict(document)).digest
    except ManifestError:
        return None


def _summary(name: str, document: Mapping[str, Any]) -> str:
    said: list[str] = []
    for field in _SUMMARIES[name]:
        value = document.get(field)
        if value is not None:
            words = field.removesuffix("_digest").replace("_", " ")
            said.append(say(value) if field in _BARE else f"{words} {say(value)}")
    return ", ".join(said)
