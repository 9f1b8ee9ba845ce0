"""A padded call answers what its bucket's shape answers, to the bit; every call is covered or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.backends.buckets import (
    Arrays,
    Bucket,
    BucketPlan,
    Inputs,
    default_plan,
    pad_inputs,
    parse_plan,
    step_in_buckets,
)
from runtime.backends.contract import Bounds, InputContract
from runtime.backends.eager import EagerExecutor
from runtime.backends.errors import BackendRefused, InputRefused
from runtime.backends.protocol import BuildOptions, LoadSpec
from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.prepare.capture import options_document, read_options
from traces.failures import FailureClass

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
plans = st.builds(BucketPlan, decode=sizes, tokens=sizes, context=sizes, pool=st.integers(2, 9000))
shapes = st.tuples(st.integers(1, 48), st.integers(1, 48), st.integers(1, 48))
CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
)
SLOTS = 23


@given(plan=plans, shape=shapes)
def test_every_call_is_covered_by_the_smallest_bucket_or_refused_with_the_nearest(
    plan: BucketPlan, shape: tuple[int, int, int]
) -> None:
    batch, tokens, context = shape
    try:
        bucket, by_rows = plan.cover(*shape)
    except InputRefused as error:
        assert error.failure_class is FailureClass.SHAPE_GUARD
        assert error.evidence["nearest_bucket"] in str(error)
        assert not any(entry.covers(*shape) for entry in plan.buckets())
        assert tokens == 1 or not any(entry.covers(1, tokens, context) for entry in plan.buckets())
        return
    asked = (1, tokens, context) if by_rows else shape
    assert bucket.covers(*asked)
    assert all(bucket.area <= entry.area for entry in plan.buckets() if entry.covers(*asked))
    assert by_rows is not any(entry.covers(*shape) for entry in plan.buckets())
    assert not by_rows or (batch > 1 and tokens > 1)


@given(plan=plans, data=st.data())
def test_every_call_within_the_narrowed_bounds_is_covered(plan: BucketPlan, data: st.DataObject) -> None:
    bounds = plan.narrow(Bounds(max_batch=64, max_tokens=64, max_context=64))
    batch = data.draw(st.integers(1, bounds.max_batch))
    tokens = data.draw(st.integers(1, bounds.max_tokens))
    context = data.draw(st.integers(1, bounds.max_context))
    bucket, by_rows = plan.cover(batch, tokens, context)
    assert bucket.covers(1 if by_rows else batch, tokens, context)


@given(plan=plans)
def test_a_plan_survives_text_manifest_and_options(plan: BucketPlan) -> None:
    assert parse_plan(plan.text(), Bounds()) == plan
    assert BucketPlan.from_document(plan.document()) == plan
    options = BuildOptions(buckets=plan)
    assert read_options(options_document(options)) == options
    assert options.bounds == plan.narrow(Bounds())


@given(batch=st.integers(1, 80), tokens=st.integers(1, 600), context=st.integers(1, 1100))
def test_the_default_plan_reaches_the_whole_of_its_bounds(batch: int, tokens: int, context: int) -> None:
    bounds = Bounds(max_batch=batch, max_tokens=tokens, max_context=context)
    assert default_plan(bounds).narrow(bounds) == bounds
    assert parse_plan("default", bounds) == default_plan(bounds)


def test_options_without_buckets_are_written_as_before() -> None:
    assert "buckets" not in options_document(BuildOptions())
    assert read_options(options_document(BuildOptions())) == BuildOptions()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "''"),
        ("rows=1,8", "rows=1,8"),
        ("decode=1,8;decode=2", "twice"),
        ("decode=8,1", r"ascending sizes of 1 or more, not \[8, 1\]"),
        ("decode=0,1", "ascending"),
        ("decode=1,,8", "sizes"),
        ("tokens=-4", "sizes"),
        ("pool=1,2", "whole number"),
        ("pool=1", "2 slots"),
    ],
)
def test_a_malformed_plan_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(BackendRefused, match=said) as caught:
        parse_plan(text, Bounds())
    assert "decode=1,8,32" in (caught.value.fix or "")


def test_a_bucket_beyond_the_bounds_is_refused_where_it_is_declared() -> None:
    with pytest.raises(BackendRefused, match="context=2048 is beyond the declared bound 1024"):
        BuildOptions(buckets=parse_plan("context=64,2048", Bounds()))


@pytest.fixture(scope="module")
def executor() -> EagerExecutor:
    import torch

    torch.manual_seed(5)
    contract = InputContract.of(CONFIG, Bounds(max_batch=8, max_tokens=16, max_context=16))
    return EagerExecutor(Decoder(CONFIG).eval().requires_grad_(False), LoadSpec(config=CONFIG, contract=contract))


def _call(batch: int, tokens: int, context: int, seed: int) -> Inputs:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, context + 1, batch)
    return (
        draw.integers(0, CONFIG.vocab_size, (batch, tokens)),
        lengths[:, None] + np.arange(tokens)[None],
        draw.integers(0, SLOTS, (batch, context)),
        lengths,
    )


small = st.lists(st.integers(1, 6), min_size=1, max_size=2, unique=True).map(lambda found: tuple(sorted(found)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(decode=small, tokens=small, context=small, data=st.data(), seed=st.integers(0, 99))
def test_a_padded_call_answers_the_same_rows_to_the_bit(
    executor: EagerExecutor,
    decode: tuple[int, ...],
    tokens: tuple[int, ...],
    context: tuple[int, ...],
    data: st.DataObject,
    seed: int,
) -> None:
    plan = BucketPlan(decode=decode, tokens=tokens, context=context)
    shape = tuple(data.draw(st.integers(1, most)) for most in (decode[-1], tokens[-1], context[-1]))
    inputs = _call(shape[0], shape[1], shape[2], seed)
    pool = executor.new_pool(SLOTS)
    filled = _call(1, SLOTS, 1, seed)
    out = executor.step(filled[0][:, :16].copy(), filled[1][:, :16].copy(), filled[2], filled[3], pool)
    pool.write(np.arange(16), out.new_k, out.new_v, rows=np.zeros(16, np.int64), columns=np.arange(16))
    ran: list[Bucket] = []

    def run(bucket: Bucket, given: Inputs) -> Arrays:
        assert (*given[0].shape, given[2].shape[1]) == (bucket.batch, bucket.tokens, bucket.context)
        ran.append(bucket)
        answer = executor.step(*given, pool)
        return answer.logits, answer.new_k.numpy(), answer.new_v.numpy()

    logits, new_k, new_v = step_in_buckets(plan, inputs, run)
    assert logits.shape[:2] == shape[:2] and new_k.shape[1:3] == shape[:2] == new_v.shape[1:3]
    bucket, by_rows = plan.cover(*shape)
    assert ran == [bucket] * (shape[0] if by_rows else 1)
    for first in range(shape[0]) if by_rows else (0,):
        rows = slice(first, first + 1) if by_rows else slice(0, shape[0])
        padded = pad_inputs(bucket, (inputs[0][rows], inputs[1][rows], inputs[2][rows], inputs[3][rows]))
        direct = executor.step(*padded, pool)
        count = rows.stop - rows.start
        assert np.array_equal(logits[rows], direct.logits[:count, : shape[1]])
        assert np.array_equal(new_k[:, rows], direct.new_k.numpy()[:, :count, : shape[1]])
    # Padding changes bits at most, never the answer: the same call at its own shape is as close as rounding lets it be.
    own = executor.step(*inputs, pool)
    assert np.allclose(logits, own.logits, rtol=0, atol=1e-5)
    assert np.allclose(new_v, own.new_v.numpy(), rtol=0, atol=1e-5)
