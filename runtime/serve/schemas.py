"""Does a JSON value keep to a JSON Schema?  Checked without network, in linear time, without quoting the value."""

from __future__ import annotations

import functools
import json
from typing import Any

MASK = "[value]"


@functools.lru_cache(maxsize=128)
def _validator(schema_text: str) -> Any:
    from jsonschema_rs import Draft202012Validator, RegexOptions

    # offline: a remote $ref is never fetched; RegexOptions: linear time, look-around refused
    return Draft202012Validator(
        json.loads(schema_text), offline=True, mask=MASK, validate_formats=True, pattern_options=RegexOptions()
    )


def violations(schema: dict[str, Any], value: Any) -> list[str]:
    """Return what the value violates, values masked; empty when it is valid."""
    validator = _validator(json.dumps(schema, separators=(",", ":")))
    return [error.message for error in validator.iter_errors(value)][:10]
