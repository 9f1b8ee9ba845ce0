"""Which tokens may the reference model write next, so that its output obeys the schema?"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.models.reference import prompt


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level BPE stands for (the table of GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        alphabet = byte_alphabet()
        count = tokenizer.get_vocab_size()
        names = [tokenizer.id_to_token(index) or "" for index in range(count)]
        special = set(prompt.SPECIAL_TOKENS)
        self.tokens = [name.encode() if name in special else bytes(alphabet[one] for one in name) for name in names]
        self.special_token_ids = [tokenizer.token_to_id(name) for name in prompt.SPECIAL_TOKENS]
        self.bos_token_id = tokenizer.token_to_id(prompt.BEGIN)
        self.eos_token_id = tokenizer.token_to_id(prompt.END)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text).ids


class OutputGrammar:
    """The grammar of one schema over one tokenizer; makes a fresh matcher for each output."""

    def __init__(self, tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
        self.size = tokenizer.get_vocab_size()
        self._tokens: Any = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))
        self._grammar: Any = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_flexible": False}
        )

    def matcher(self) -> Any:
        """Return a matcher at the beginning of an output; raises ValueError if the schema cannot be enforced."""
        matcher = llguidance.LLMatcher(self._tokens, self._grammar)
        if matcher.is_error():
            raise ValueError(f"the output schema cannot be enforced: {matcher.get_error()}")
        return matcher

    def allowed(self, matchers: list[Any]) -> NDArray[np.bool_]:
        """Return which tokens each matcher allows next, [matchers, vocabulary]."""
        mask = llguidance.numpy.allocate_token_bitmask(len(matchers), self.size)
        for row, matcher in enumerate(matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, mask, row)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        return bits[:, : self.size].astype(bool)
