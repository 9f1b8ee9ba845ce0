"""How is the reference tokenizer built?

Byte-level BPE, so any text has tokens. Digits come in pairs: an identifier of four digits is then two tokens, which
copies with fewer ambiguous steps than four. Run as a program to write tokenizer.json.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime.models.reference import prompt, task

VOCABULARY = 768
PIECES = r"""\.","sources":\["[PAT]-|\.| ?\p{L}+|\p{N}{1,2}|[^\s\p{L}\p{N}.]+|\s"""
"""From an answer's last word to its source's number is one piece, so that a short look back finds what is cited."""


def _texts(seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    for pair in range(100):
        for _ in range(count // 10):  # every digit pair must become a token
            yield f"{pair:02d}"
    for _ in range(count):
        drawn = task.example(rng, "training")
        yield from (prompt.cited(text, identity) for identity, text in drawn.articles)
        yield from drawn.account_records
        yield drawn.question
        yield from drawn.outputs
        yield from drawn.tool_results


def build(*, seed: int = 0, count: int = 20_000) -> Tokenizer:
    """Train the tokenizer on generated training texts; same seed and library version, same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(prompt.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, count), trainer)
    return tokenizer


def main() -> None:
    """Write tokenizer.json to the folder given."""
    parser = argparse.ArgumentParser(description="Build the reference tokenizer.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for tokenizer.json")
    arguments = parser.parse_args()
    build().save(str(arguments.output / "tokenizer.json"))


if __name__ == "__main__":
    main()
