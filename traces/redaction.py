"""What may be written down, and what is hidden first?

Applied by the recorder before an event is encoded, hashed or stored.  First an allow-list of fields: free text is kept
only in the fields listed here, content (prompts, answers, arguments, credentials) never, whatever it holds.  Then a
table of secret patterns runs over every string that is kept, keys included.  Actor and tenant become keyed pseudonyms.
Content itself belongs into evidence blobs, which the event names by digest and which can be erased.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec

MARKER = "__REDACTED__"
POLICY_VERSION = "redaction-2"
DEEPEST = 64
_SYMBOL_CHARACTERS = 256
_CACHE_STRINGS = 8_192

# Produced by our own encoders and read back by replay: any change would break it, and it holds numbers only.
VERBATIM = frozenset({"plan"})

# Fields whose free text is kept (after the patterns), wherever they stand.
FREE_TEXT = frozenset(
    {"message", "fix", "reason", "retry_reason", "detail", "rule", "failed_rule", "label", "title", "warnings"}
)

# Documents that our own code writes to describe pins, stages and failures: free text below them is kept.
DOCUMENTS = frozenset(
    {"record", "manifest", "documents", "pins", "evidence", "scheduling", "options", "workload", "set", "verdict"}
)

# Content and credentials: withheld wherever they stand, unless the value is a number, a digest or a reference.
WITHHELD = frozenset(
    {
        *("prompt", "system_prompt", "messages", "completion", "question", "answer", "content", "transcript"),
        *("arguments", "tool_arguments", "tool_result", "headers", "cookie", "cookies", "set_cookie", "authorization"),
        *("password", "passwd", "secret", "client_secret", "api_key", "apikey", "access_token", "refresh_token"),
        *("private_key", "credential", "credentials", "idempotency_key"),
    }
)

_PATTERNS: tuple[tuple[str, str], ...] = (
    ("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
    ("provider key", r"\b(?:sk|pk|rk|rlk)[-_](?:[A-Za-z]+[-_])*[A-Za-z0-9_-]{16,}"),
    ("GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}"),
    ("GitLab token", r"\bglpat-[A-Za-z0-9_-]{16,}"),
    ("AWS key id", r"\b(?:AKIA|ASIA|AROA)[0-9A-Z]{16}\b"),
    ("Google key", r"\bAIza[0-9A-Za-z_-]{35}"),
    ("Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    ("Hugging Face token", r"\bhf_[A-Za-z0-9]{20,}"),
    ("package index token", r"\bpypi-[A-Za-z0-9_-]{16,}|\bnpm_[A-Za-z0-9]{30,}"),
    ("JSON web token", r"\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*"),
    ("authorization header", r"\b(?:[Bb]earer|[Bb]asic)\s+[A-Za-z0-9._~+/=-]{8,}"),
    ("credentials in a URL", r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"),
    (
        "named secret",
        r"(?i:(?<![a-z])(?:password|passwd|secret|api[_-]?key|access[_-]?token|auth[_-]?token|private[_-]?key)"
        r"[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&]{4,}",
    ),
    ("e-mail address", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"),
    ("telephone number", r"(?<![\w.])\+\d{1,3}[ .-]?\(?\d{2,4}\)?(?:[ .-]?\d{2,4}){2,4}(?!\w)"),
    ("social security number", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"),
)
_SECRET = re.compile("|".join(f"(?:{pattern})" for _, pattern in _PATTERNS))
_CARD = re.compile(r"(?<![0-9A-Za-z.])\d(?:[ -]?\d){12,18}(?![0-9A-Za-z])")
_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![0-9A-Za-z])")
# Identities of our own making, by shape: digests, references, hexadecimal ids with a short prefix.
_IDENTITY = re.compile(r"(?:evidence://sha256/|sha256:)?[0-9a-f]{16,128}|[a-z]{2,12}_[0-9a-f]{24,40}")
_PSEUDONYM = re.compile(r"[a-z]+_[0-9a-f]{24}")


@dataclass(frozen=True)
class Redacted:
    """A value after redaction and whether anything in it was hidden."""

    value: dict[str, Any]
    hidden: bool


class Redactor:
    """Hides secrets and names under one ledger's key.  Used by one thread."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._clean: set[str] = set()
        self._pseudonyms: dict[tuple[str, str], str] = {}
        self._hidden = False

    def pseudonym(self, kind: str, name: str) -> str:
        """Return ``<kind>_<24 hex>``: the same name gives the same one in this ledger; a pseudonym stays itself."""
        known = self._pseudonyms.get((kind, name))
        if known is None:
            if _PSEUDONYM.fullmatch(name) and name.startswith(f"{kind}_"):
                return name
            digest = hmac.new(self._key, f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()
            known = f"{kind}_{digest[:24]}"
            if len(self._pseudonyms) < _CACHE_STRINGS:
                self._pseudonyms[kind, name] = known
        return known

    def payload(self, payload: Mapping[str, Any]) -> Redacted:
        """Return the payload as plain JSON values with everything hidden that may not be kept.

        Raises:
            ValueError: it is nested deeper than 64 levels.
            TypeError: it holds something that has no JSON form.
        """
        self._hidden = False
        value = self._mapping(payload, described=False, depth=0)
        return Redacted(value, self._hidden)

    def text(self, text: str) -> str:
        """Return a text with every secret pattern replaced by the marker."""
        if len(text) < 6 or text in self._clean or _IDENTITY.fullmatch(text):
            return text
        cleaned = _SECRET.sub(MARKER, text)
        cleaned = _CARD.sub(_hide_if(_is_card), cleaned)
        cleaned = _IBAN.sub(_hide_if(_is_iban), cleaned)
        if cleaned == text and len(text) <= 128:
            if len(self._clean) >= _CACHE_STRINGS:
                self._clean.clear()
            self._clean.add(text)
        return cleaned

    def _mapping(self, mapping: Mapping[Any, Any], *, described: bool, depth: int) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in mapping.items():
            key = self._kept_text(name if isinstance(name, str) else str(name))
            kind = type(value)
            if kind is int or kind is bool or value is None or (kind is str and key in VERBATIM):
                kept[key] = value
            elif key.lower() in WITHHELD:
                kept[key] = self._withheld(value)
            else:
                kept[key] = self._value(
                    value, described=described or key in DOCUMENTS or key in FREE_TEXT, depth=depth + 1
                )
        return kept

    def _value(self, value: Any, *, described: bool, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        kind = type(value)
        if kind is str:
            return self._string(value, described=described)
        if kind is int or kind is bool or value is None:
            return value
        if kind is float:
            return value if value - value == 0.0 else str(value)  # JSON has no infinity and no NaN
        if isinstance(value, Mapping):
            return self._mapping(cast("Mapping[Any, Any]", value), described=described, depth=depth)
        if isinstance(value, list | tuple | set | frozenset):
            items = cast("list[Any]", value)
            return [self._value(item, described=described, depth=depth + 1) for item in items]
        return self._value(_plain(value), described=described, depth=depth + 1)

    def _string(self, text: str, *, described: bool) -> str:
        if not described and text not in self._clean and not _is_symbol(text):
            self._hidden = True
            return MARKER
        return self._kept_text(text)

    def _kept_text(self, text: str) -> str:
        cleaned = self.text(text)
        if cleaned is not text and cleaned != text:
            self._hidden = True
        return cleaned

    def _withheld(self, value: Any) -> Any:
        if isinstance(value, str) and _IDENTITY.fullmatch(value):
            return value
        if isinstance(value, int | float) or value is None:
            return value
        self._hidden = True
        return MARKER


def _is_symbol(text: str) -> bool:
    """A name, number or path, not prose: no white space between printable characters, and short."""
    return len(text) <= _SYMBOL_CHARACTERS and not any(character.isspace() for character in text)


def _hide_if(is_secret: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
    return lambda match: MARKER if is_secret(match.group()) else match.group()


def _is_card(text: str) -> bool:
    """Luhn's check over 13 to 19 digits that do not all agree."""
    digits = [int(character) for character in text if character.isdigit()]
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0 and len(set(digits)) > 1


def _is_iban(text: str) -> bool:
    """ISO 13616: the rearranged number is 1 modulo 97."""
    packed = text.replace(" ", "")
    rearranged = packed[4:] + packed[:4]
    return len(packed) >= 15 and int("".join(str(int(character, 36)) for character in rearranged)) % 97 == 1


def _plain(value: Any) -> Any:
    """Turn enumerations, records, paths and numpy scalars into plain values before they are looked at."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", 0) == 0:
        return item()
    if hasattr(value, "__fspath__"):
        return str(value)
    plain = msgspec.to_builtins(value)
    if type(plain) is type(value):
        raise TypeError(f"a {type(value).__name__} has no JSON form")
    return plain
