"""What do all pinned documents share?  Frozen, versioned, unknown fields refused, named by their content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from manifests.canonical import DIGEST_PATTERN, LARGEST_INTEGER, canonical_bytes, digest
from manifests.errors import DigestError, DocumentError
from manifests.frozen import freeze


def decimal_text(value: object) -> object:
    """Write a number as the one decimal text that stands for it: ``1.0`` and ``"1.00"`` are both ``"1"``.

    Anything that is no finite number is returned as it is, for the schema to refuse.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return value
    try:
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except InvalidOperation:
        return value
    if not number.is_finite() or abs(number.adjusted()) > 40:
        return value
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _printable_keys(value: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in value:
        if re.fullmatch(r"[\x21-\x7e]+", key) is None:
            raise ValueError(f"the key {key!r} must be printable ASCII without spaces")
    return freeze(value)


Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
"""``sha256:`` and 64 hex digits."""
Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
"""An integer from 0 to 2**53 - 1."""
PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
DecimalText = Annotated[str, BeforeValidator(decimal_text), Field(pattern=r"^-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?$")]
"""A number as its shortest decimal text, because floats are not hashed."""
TextMap = Annotated[dict[str, str], AfterValidator(_printable_keys)]
"""Printable ASCII names to texts."""
DigestMap = Annotated[dict[str, Digest], AfterValidator(_printable_keys)]
DecimalMap = Annotated[dict[str, DecimalText], AfterValidator(_printable_keys)]
JsonMap = Annotated[dict[str, Any], AfterValidator(freeze)]
"""Any canonical JSON object."""


class Manifest(BaseModel):
    """A frozen document that its own content names.

    Subclasses begin with ``document``, a literal of kind and schema version, so that documents of two kinds never share
    a digest and a reader knows what it holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    later_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that came after documents of this version were recorded. At its default such a field is left out of the
    document, so that what was recorded before it is read as it was meant and keeps its digest."""
    earlier: ClassVar[Mapping[str, Any]] = {}
    """What documents without a later field meant, where new ones have another default: that value is left out then."""

    @classmethod
    def left_out(cls, name: str) -> Any:
        """Return the value that a document without this field stands for."""
        return cls.earlier[name] if name in cls.earlier else cls.model_fields[name].default

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        for name in self.later_fields:
            if name in document and getattr(self, name) == self.left_out(name):
                del document[name]
        return document

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        """Refuse at once what could not be hashed later: a lone surrogate, a float in an open mapping."""
        self.canonical()
        return self

    def canonical(self) -> bytes:
        """Return the canonical JSON bytes of all fields."""
        return canonical_bytes(self.to_document())

    @property
    def digest(self) -> str:
        """Name this document; computed from its bytes every time, never stored."""
        return digest(self.canonical())

    def to_document(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read plain JSON values (lists where fields are tuples).

        Raises:
            DocumentError: an unknown, missing or ill-typed field.
        """
        return cls._parse(canonical_bytes(dict(document)))

    @classmethod
    def from_bytes(cls, data: bytes, digest: str | None = None) -> Self:
        """Read canonical bytes, checking them against the digest they were asked for by.

        Raises:
            DigestError: the bytes hash to something else; nothing is parsed then.
            DocumentError: the bytes do not fit the schema or are not canonical.
        """
        if digest is not None:
            check_digest(data, digest, what=cls.__name__)
        document = cls._parse(data)
        if document.canonical() != data:
            raise DocumentError(
                "the bytes are not in canonical form, so their digest names nothing",
                where=cls.__name__,
                fix="Write documents with .canonical()",
            )
        return document

    @classmethod
    def _parse(cls, data: bytes) -> Self:
        try:
            document = cls.model_validate_json(data)
        except ValidationError as error:
            raise DocumentError(describe(error), where=cls.__name__) from None
        unsaid = {name: value for name, value in cls.earlier.items() if name not in document.model_fields_set}
        return document.model_copy(update=unsaid) if unsaid else document


def check_digest(data: bytes, expected: str, *, what: str) -> None:
    """Raise DigestError unless the bytes hash to the expected digest."""
    actual = digest(data)
    if actual != expected:
        raise DigestError(
            f"the bytes hash to {actual}, asked for was {expected}",
            where=what,
            fix="The stored document was changed or is another one; restore it from its source",
        )


def describe(error: ValidationError) -> str:
    """Say in one line what a validation refused, field by field, without echoing long inputs."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "document"
        shown = "" if item["type"] == "missing" else f" (got {str(item.get('input'))[:60]!r})"
        lines.append(f"{where}: {item['msg']}{shown}")
    return "; ".join(lines)
