"""Which pieces of a text are secrets, and what stands in their place?

Applied before a text reaches the model or the record, so that both see the same. Patterns only: names and addresses
are not found (measured: nobody's patterns find them).
"""

from __future__ import annotations

import re
import unicodedata

MASK = "[redacted]"
VERSION = "secret-patterns/1"

_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("private_key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
        ("jwt", r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
        ("aws_key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
        ("github_token", r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
        ("api_key", r"\b(?:sk|pk|rk|rlk)[-_](?:[a-z]+[-_])*[A-Za-z0-9_-]{16,}"),
        ("slack_token", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
        ("google_key", r"\bAIza[0-9A-Za-z_-]{35}"),
        ("bearer", r"(?i:\bbearer)\s+[A-Za-z0-9._~+/=-]{8,}"),
        ("password", r"(?i:\b(?:password|passwd|secret|token))\s*[:=]\s*\S{6,}"),
        ("email", r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}"),
        ("card", r"\b(?:\d[ -]?){15}\d\b"),
        ("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"),
    )
)


def mask(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text with secrets masked, and the kinds that were found."""
    found: list[str] = []
    for name, pattern in _PATTERNS:
        text, count = pattern.subn(MASK, text)
        found += [name] * count
    return text, tuple(found)


def normalize(text: str) -> str:
    """Return NFC text without control characters, white space collapsed."""
    plain = unicodedata.normalize("NFC", text)
    visible = "".join(" " if unicodedata.category(letter) in {"Cc", "Zl", "Zp"} else letter for letter in plain)
    return " ".join(visible.split())
