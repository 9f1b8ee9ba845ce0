"""Which tokens may come next under a JSON schema?  Constrained decoding by llguidance.

The mask is applied to a copy of the logits; digests and log-probabilities stay those of the raw row.  llguidance never
raises by itself, so every call asks `is_error()`; a schema it refuses is the caller's to repair (validation_policy).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.engine.errors import EngineFailed, GrammarRefused

LARGEST_SCHEMA = 64 * 1024
"""Characters; a schema of thousands of properties costs seconds before it is refused."""


class TextTokenizer(Protocol):
    """What is needed of `tokenizers.Tokenizer`."""

    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...
    def id_to_token(self, id: int) -> str | None: ...  # noqa: A002  the library's own name
    def get_added_tokens_decoder(self) -> Any: ...
    def encode(
        self, sequence: Any, pair: Any = None, is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> Any: ...


class Constraint:
    """The grammar state of one sequence."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, bitmask: NDArray[np.int32], row: int) -> None:
        """Write the allowed tokens into a row of a bitmask [n, ceil(vocabulary / 32)]."""
        import llguidance.numpy as masks

        masks.fill_next_token_bitmask(self._matcher, bitmask, row)
        self._check()

    def accept(self, token: int) -> None:
        """Advance by a token; raises EngineFailed when the grammar does not allow it."""
        if not self._matcher.consume_token(token):
            self._check()
            raise EngineFailed("the grammar refused a token that its mask allowed", reason="grammar_state")

    def follow(self, token: int) -> bool:
        """Advance by a token that came from elsewhere; False when the grammar does not allow it."""
        return bool(self._matcher.consume_token(token)) and not self._matcher.is_error()

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineFailed(f"constrained decoding failed: {self._matcher.get_error()}", reason="grammar_state")


class GrammarCompiler:
    """Compiles schemas for one tokenizer; the tokenizer's trie is built once, a schema's grammar once."""

    def __init__(self, tokenizer: TextTokenizer | None, *, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._wrapped: dict[int, Any] = {}
        self._matchers: dict[tuple[str, int], Any] = {}

    def constrain(self, schema: str, *, stop_token_ids: Sequence[int]) -> Constraint:
        """Start a constraint; its end is the first stop token.  Raises GrammarRefused."""
        if not stop_token_ids:
            raise _refused("a constrained sequence needs a stop token", fix="set stop_token_ids")
        key = (schema, stop_token_ids[0])
        if key not in self._matchers:
            if len(self._matchers) >= 256:  # compiled schemas of callers long gone
                self._matchers.clear()
            self._matchers[key] = self._compile(schema, stop_token_ids[0])
        return Constraint(self._matchers[key].deep_copy())

    def _compile(self, schema: str, end: int) -> Any:
        import llguidance

        if self._tokenizer is None:
            raise _refused("the package has no tokenizer", fix="prepare a checkpoint with its tokenizer.json")
        if len(schema) > LARGEST_SCHEMA:
            raise _refused(f"the schema has {len(schema)} characters", fix=f"keep it below {LARGEST_SCHEMA}")
        if end not in self._wrapped:
            self._wrapped[end] = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, end))
            )
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise _refused(f"the schema is not JSON: {error}", fix="give a JSON schema document") from error
        matcher = llguidance.LLMatcher(self._wrapped[end], grammar)
        if matcher.is_error():
            raise _refused(f"the schema cannot constrain decoding: {matcher.get_error()}", fix="use supported keywords")
        return matcher


def bitmask(rows: int, vocab_size: int) -> NDArray[np.int32]:
    """Return a mask that allows everything, int32 [rows, ceil(vocabulary / 32)]."""
    return np.full((rows, -(-vocab_size // 32)), -1, dtype=np.int32)


def allowed_tokens(mask: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """Unpack a bitmask into bool [rows, vocabulary]."""
    return np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little", count=vocab_size).view(np.bool_)


class _Vocabulary:
    """The tokenizer as llguidance wants it: each token's bytes, by the byte-level table of GPT-2."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.bos_token_id = None
        letters = _byte_of_letter()
        added = {int(number): str(token.content) for number, token in tokenizer.get_added_tokens_decoder().items()}
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for number in range(vocab_size):
            text = tokenizer.id_to_token(number)
            if text is None or number in added:
                self.special_token_ids.append(number)
                self.tokens.append((added.get(number) or f"<|unused {number}|>").encode())
            else:
                self.tokens.append(b"".join(bytes([letters[letter]]) for letter in text))

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return list(self._tokenizer.encode(plain, add_special_tokens=False).ids)


def _byte_of_letter() -> dict[str, int]:
    """Invert GPT-2's table: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(number): number for number in printable}
    others = [number for number in range(256) if number not in set(printable)]
    return table | {chr(256 + offset): number for offset, number in enumerate(others)}


def _refused(message: str, *, fix: str) -> GrammarRefused:
    return GrammarRefused(message, reason="grammar_refused", evidence={"failed_rule": "json_schema"}, fix=fix)
