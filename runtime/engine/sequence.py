"""What has one sequence produced so far, and is it done?  The same for a live engine and for a replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engine.errors import SamplingRefused
from runtime.engine.generation import FinishReason, GenerationRequest, TokenRecord
from runtime.engine.grammar import Constraint, GrammarCompiler, allowed_tokens, bitmask
from runtime.engine.sampling import Choices, Draw, Peaks, Scratch, check_sampling, choose, stream_base


def check_request(request: GenerationRequest, *, vocab_size: int) -> None:
    """Raise SamplingRefused for a request that no engine could run."""
    check_sampling(request.sampling)
    tokens = (*request.prompt, *(request.forced_tokens or ()), *request.sampling.stop_token_ids)
    if not request.prompt or min(tokens) < 0 or max(tokens) >= vocab_size:
        raise SamplingRefused(
            "the prompt is empty" if not request.prompt else f"a token is outside the vocabulary of {vocab_size}",
            reason="prompt_tokens",
            fix="encode the prompt with the package's own tokenizer",
        )


class Output:
    """The output side of one sequence: tokens, their evidence, the grammar's state and the stop rules."""

    def __init__(self, request: GenerationRequest, constraint: Constraint | None = None) -> None:
        sampling = request.sampling
        self.request = request
        self.constraint = constraint
        self.tokens: list[int] = []
        self.records: list[TokenRecord] = []
        self._base = stream_base(sampling.seed, sampling.stream)
        self._prompt_tokens = len(request.prompt)
        self._most = sampling.max_tokens
        self._forced = request.forced_tokens or ()
        self._stops = frozenset(sampling.stop_token_ids)
        self._greedy = Draw(self._base, 0) if sampling.temperature == 0.0 else None

    def draw(self) -> Draw:
        """Say how the next token is to be drawn."""
        if self._greedy is not None:
            return self._greedy
        sampling = self.request.sampling
        return Draw(self._base, len(self.tokens), sampling.temperature, sampling.top_k, sampling.top_p)

    def accept(self, choices: Choices, row: int, *, step: int, emitted_us: int) -> FinishReason | None:
        """Take the token of one row of a choice; return why the sequence ends with it, or None."""
        chosen, place = choices.tokens[row], len(self.tokens)
        fed = self._forced[place] if place < len(self._forced) else chosen
        self.tokens.append(fed)
        digest, logprob, margin = choices.digests[row], choices.logprobs[row], choices.margins[row]
        position = self._prompt_tokens + place
        self.records.append(TokenRecord(chosen, digest, logprob, margin, step, position, emitted_us))
        if fed in self._stops:
            return "stop"
        if self.constraint is not None:
            if place >= len(self._forced):
                self.constraint.accept(fed)
            elif not self.constraint.follow(fed):
                self.constraint = None  # forced off the grammar: what follows is unconstrained
            if self.constraint is not None and self.constraint.finished:
                return "stop"
        return "length" if place + 1 >= self._most else None


def start_output(request: GenerationRequest, grammars: GrammarCompiler) -> Output:
    """Begin a sequence's output; raises GrammarRefused for a schema that cannot constrain it."""
    if request.grammar is None:
        return Output(request)
    constraint = grammars.constrain(request.grammar, stop_token_ids=request.sampling.stop_token_ids)
    return Output(request, constraint)


def choose_for(
    outputs: Sequence[Output],
    logits: NDArray[np.float32],
    *,
    found: Peaks | None = None,
    scratch: Scratch | None = None,
) -> Choices:
    """Choose the next token of each output from its row of raw logits, float32 [n, vocabulary]; see `choose`."""
    allowed = None
    if any(output.constraint is not None for output in outputs):
        vocab_size = logits.shape[1]
        mask = bitmask(len(outputs), vocab_size)
        for row, output in enumerate(outputs):
            if output.constraint is not None:
                output.constraint.fill(mask, row)
        allowed = allowed_tokens(mask, vocab_size)
    return choose(logits, [output.draw() for output in outputs], allowed, found=found, scratch=scratch)
