"""Constrained output always satisfies its schema, and a schema that cannot constrain is refused, not ignored."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime.engine.errors import GrammarRefused
from runtime.engine.grammar import GrammarCompiler, allowed_tokens, bitmask
from runtime.engine.sampling import Draw, choose
from traces.failures import FailureClass

VOCABULARY = 330
END = 258
SCHEMA = json.dumps(
    {
        "anyOf": [
            {
                "type": "object",
                "properties": {"tool": {"const": "lookup"}, "account": {"type": "string", "pattern": "^[0-9]{4}$"}},
                "required": ["tool", "account"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"answer": {"type": "string", "maxLength": 6}},
                "required": ["answer"],
                "additionalProperties": False,
            },
        ]
    }
)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """Over a byte tokenizer; the model's vocabulary is larger than the tokenizer's."""
    from runtime.models.random_checkpoint import byte_tokenizer

    return GrammarCompiler(byte_tokenizer(320), vocab_size=VOCABULARY)


def test_random_logits_give_valid_documents(compiler: GrammarCompiler) -> None:
    """Twenty random samplings all parse and fit one of the two shapes, and end by themselves."""
    from runtime.models.random_checkpoint import byte_tokenizer

    tokenizer = byte_tokenizer(320)
    draw = np.random.default_rng(0)
    for trial in range(20):
        constraint = compiler.constrain(SCHEMA, stop_token_ids=(END,))
        tokens: list[int] = []
        while not constraint.finished and len(tokens) < 80:
            mask = bitmask(1, VOCABULARY)
            constraint.fill(mask, 0)
            logits = draw.standard_normal((1, VOCABULARY)).astype(np.float32)
            choices = choose(logits, [Draw(trial, len(tokens), 1.0)], allowed_tokens(mask, VOCABULARY))
            constraint.accept(choices.tokens[0])
            tokens += choices.tokens
        document = json.loads(tokenizer.decode([token for token in tokens if token != END]))
        assert set(document) in ({"tool", "account"}, {"answer"})
        if "account" in document:
            assert len(document["account"]) == 4
            assert document["account"].isdigit()


def test_constraints_of_one_schema_do_not_share_state(compiler: GrammarCompiler) -> None:
    """A compiled schema is reused; each sequence starts at its beginning."""
    first = compiler.constrain(SCHEMA, stop_token_ids=(END,))
    before, after = bitmask(1, VOCABULARY), bitmask(1, VOCABULARY)
    first.fill(before, 0)
    first.accept(int(np.flatnonzero(allowed_tokens(before, VOCABULARY)[0])[0]))
    compiler.constrain(SCHEMA, stop_token_ids=(END,)).fill(after, 0)
    assert (before == after).all()


@pytest.mark.parametrize(
    "schema", ["{", '{"type": "nonsense"}', '{"not": {}}', '{"type": "array", "uniqueItems": true}', " " * 70_000]
)
def test_a_schema_that_cannot_constrain_is_refused(compiler: GrammarCompiler, schema: str) -> None:
    """With the class that lets the caller repair it."""
    with pytest.raises(GrammarRefused) as caught:
        compiler.constrain(schema, stop_token_ids=(END,))
    assert caught.value.failure_class is FailureClass.VALIDATION_POLICY
    with pytest.raises(GrammarRefused):
        compiler.constrain(SCHEMA, stop_token_ids=())
