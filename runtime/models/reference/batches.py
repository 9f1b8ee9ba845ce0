"""Which token sequences does training see?

The task itself, and plain copying: of random tokens, and of one of several random segments named by its first tokens.
Copying comes first because the task is learned through it (the task alone stays at 0% for thousands of steps).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from runtime.models.reference import prompt, task

PROMPT_WEIGHT = 0.03
LENGTH_STEP = 16  # few different lengths, because the matrix library compiles a kernel for each
Sequence = tuple[list[int], list[float]]  # tokens, and the weight of each token's loss
Batch = tuple[Tensor, Tensor, Tensor]  # inputs [B, T], targets [B, T], weights [B, T]


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the token of every role marker; raises ValueError if the tokenizer lacks one."""
    found = {name: tokenizer.token_to_id(name) for name in prompt.SPECIAL_TOKENS}
    if None in found.values():
        raise ValueError("the tokenizer lacks a role marker of runtime.models.reference.prompt: build it again")
    return {name: token for name, token in found.items() if token is not None}


class Source:
    """Draws weighted sequences from a seed."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(f"batches {seed}")
        self.special = special_tokens(tokenizer)
        self.pairs = [tokenizer.encode(f"{pair:02d}").ids[0] for pair in range(100)]
        self.ordinary = list(range(len(prompt.SPECIAL_TOKENS), tokenizer.get_vocab_size()))

    def drawn(self, copying: float) -> Sequence:
        """Return a copying exercise with probability `copying`, else an example of the task."""
        if self.rng.random() >= copying:
            return self.exercise()
        return self.repetition() if self.rng.random() < 0.5 else self.recall()

    def exercise(self) -> Sequence:
        """Return one example of the task, every turn's output weighted fully."""
        most = 4 if self.rng.random() < 0.95 else 9
        drawn = task.example(self.rng, "training", most_articles=most)
        text = prompt.render(articles=drawn.articles, account_records=drawn.account_records, question=drawn.question)
        tokens = self.tokenizer.encode(text).ids
        weights = [PROMPT_WEIGHT] * len(tokens)
        for index, output in enumerate(drawn.outputs):
            written = self.tokenizer.encode(output + prompt.END).ids
            tokens += written
            weights += [1.0] * len(written)
            if index < len(drawn.tool_results):
                read = self.tokenizer.encode(f"{prompt.TOOL}{drawn.tool_results[index]}{prompt.ASSISTANT}").ids
                tokens += read
                weights += [PROMPT_WEIGHT] * len(read)
        return tokens, weights

    def _random(self, count: int) -> list[int]:
        pool = self.pairs if self.rng.random() < 0.3 else self.ordinary
        return self.rng.choices(pool, k=count)

    def repetition(self) -> Sequence:
        """Return random tokens and their repetition."""
        first = self._random(self.rng.randint(8, 50))
        special = self.special
        tokens = [special[prompt.BEGIN], *first, special[prompt.ASSISTANT], *first, special[prompt.END]]
        return tokens, [0.0] * (len(first) + 2) + [1.0] * (len(first) + 1)

    def recall(self) -> Sequence:
        """Return random segments in the place of articles, then the name of one and its whole."""
        special = self.special
        segments = [self._random(self.rng.randint(3, 14)) for _ in range(self.rng.randint(2, 5))]
        wanted = self.rng.choice(segments)
        tokens = [special[prompt.BEGIN]]
        for segment in segments:
            tokens += [special[prompt.POLICY], *segment]
        tokens += [special[prompt.USER], *self.rng.sample(wanted, self.rng.randint(1, 2)), special[prompt.ASSISTANT]]
        weights = [0.0] * len(tokens)
        return [*tokens, *wanted, special[prompt.END]], weights + [1.0] * (len(wanted) + 1)

    def batches(self, size: int, copying: float, *, pool: int = 16) -> Iterator[Batch]:
        """Yield `pool` batches of `size` sequences, each of sequences of similar length to save padding."""
        drawn = sorted((self.drawn(copying) for _ in range(size * pool)), key=lambda one: len(one[0]))
        groups = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        self.rng.shuffle(groups)
        for group in groups:
            yield padded(group, self.special[prompt.PAD])


def padded(group: list[Sequence], pad: int) -> Batch:
    """Return the sequences as shifted tensors; padding has no weight."""
    longest = max(len(tokens) for tokens, _ in group)
    longest += -(longest - 1) % LENGTH_STEP
    tokens = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in group])
    weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in group])
    return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
