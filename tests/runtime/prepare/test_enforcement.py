"""What the manifest declares is enforced before every call, on every backend, here and in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runtime.backends.errors import InputRefused
from runtime.backends.hosted_process import Hosting
from runtime.backends.protocol import Support
from runtime.backends.registry import BACKENDS
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage
from runtime.prepare.store import PackageStore
from traces.failures import FailureClass, rule_of

Prepared = Callable[..., PreparedPackage]
SLOTS = 24
NAMES = ("token_ids", "positions", "slots", "context_lengths")


def good(executor: Any) -> dict[str, Any]:
    """Inputs of one row in a shape that every backend has: one token, eight gathered slots."""
    return {
        "token_ids": np.array([[executor.config.vocab_size - 1]], dtype=np.int64),
        "positions": np.array([[8]], dtype=np.int64),
        "slots": np.arange(8, dtype=np.int64)[None] + 3,
        "context_lengths": np.array([5], dtype=np.int64),
    }


def broken(executor: Any) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Give, by case: the input that is to blame, the rule it breaks, and the inputs."""
    bounds, base = executor.contract.bounds, good(executor)
    rows = bounds.max_batch + 1

    def changed(**values: Any) -> dict[str, Any]:
        return {**base, **values}

    def full(*shape: int, value: int = 0, dtype: Any = np.int64) -> Any:
        return np.full(shape, value, dtype=dtype)

    return {
        "dtype: 32 bits": ("token_ids", "dtype", changed(token_ids=full(1, 1, dtype=np.int32))),
        "dtype: floats": ("positions", "dtype", changed(positions=full(1, 1, dtype=np.float32))),
        "dtype: byte order": ("slots", "dtype", changed(slots=base["slots"].astype(">i8"))),
        "dtype: no array": ("context_lengths", "dtype", changed(context_lengths=[5])),
        "rank": ("token_ids", "rank", changed(token_ids=full(1))),
        "rank of lengths": ("context_lengths", "rank", changed(context_lengths=full(1, 1))),
        "bound of B": (
            "token_ids",
            "bound of B",
            changed(token_ids=full(rows, 1), positions=full(rows, 1), slots=full(rows, 8), context_lengths=full(rows)),
        ),
        "bound of T": (
            "token_ids",
            "bound of T",
            changed(token_ids=full(1, bounds.max_tokens + 1), positions=full(1, bounds.max_tokens + 1)),
        ),
        "bound of S": ("slots", "bound of S", changed(slots=full(1, bounds.max_context + 1))),
        "nothing": ("token_ids", "bound of B", changed(token_ids=full(0, 1), positions=full(0, 1))),
        "relation of T": ("positions", "relation of dimensions", changed(positions=full(1, 2))),
        "relation of B": ("slots", "relation of dimensions", changed(slots=full(2, 8))),
        "relation of lengths": ("context_lengths", "relation of dimensions", changed(context_lengths=full(2))),
        "token beyond": ("token_ids", "index range", changed(token_ids=full(1, 1, value=executor.config.vocab_size))),
        "token negative": ("token_ids", "index range", changed(token_ids=full(1, 1, value=-1))),
        "position beyond": (
            "positions",
            "index range",
            changed(positions=full(1, 1, value=executor.contract.max_positions)),
        ),
        "slot beyond": ("slots", "index range", changed(slots=full(1, 8, value=SLOTS))),
        "slot far beyond": ("slots", "index range", changed(slots=full(1, 8, value=10**6))),
        "slot negative": ("slots", "index range", changed(slots=full(1, 8, value=-1))),
        "length beyond": ("context_lengths", "index range", changed(context_lengths=full(1, value=9))),
        "length negative": ("context_lengths", "index range", changed(context_lengths=full(1, value=-1))),
    }


@pytest.fixture(scope="session")
def executors(prepared: Prepared, store: PackageStore) -> Callable[[str], Any]:
    """Loaded executors by name; `hosted` is an eager one in a process of its own."""
    held: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in held:
            package = prepared("eager" if name == "hosted" else name, "float32").digest
            hosting = Hosting() if name == "hosted" else None
            held[name] = load_package(store, package, hosting=hosting).executor
        return held[name]

    return get


@pytest.mark.parametrize("name", [*(backend.name for backend in BACKENDS), "hosted"])
def test_every_backend_refuses_the_same_inputs_with_the_same_error(executors: Callable[[str], Any], name: str) -> None:
    executor, reference = executors(name), executors("eager")
    pool = executor.new_pool(SLOTS)
    for case, (blamed, rule, inputs) in broken(executor).items():
        with pytest.raises(InputRefused) as caught:
            executor.step(*(inputs[one] for one in NAMES), pool)
        failure = caught.value
        assert failure.failure_class is FailureClass.SHAPE_GUARD, case
        assert (failure.evidence["input"], failure.evidence["rule"]) == (blamed, rule), case
        assert set(rule_of(failure.failure_class).evidence) <= set(failure.complete_evidence()), case
        with pytest.raises(InputRefused) as expected:
            reference.contract.check(**inputs, num_slots=SLOTS)
        assert failure.to_payload() == expected.value.to_payload(), "every backend says the same"
    executor.step(*good(executor).values(), pool)


@pytest.mark.parametrize("name", [*(backend.name for backend in BACKENDS), "hosted"])
def test_strided_and_read_only_inputs_give_the_same_bits(executors: Callable[[str], Any], name: str) -> None:
    executor = executors(name)
    pool, inputs = executor.new_pool(SLOTS), good(executor)
    expected = np.array(executor.step(*inputs.values(), pool).logits)
    strided = {key: np.repeat(value, 2, axis=-1)[..., ::2] for key, value in inputs.items()}
    assert not strided["slots"].flags.c_contiguous
    assert np.array_equal(executor.step(*strided.values(), pool).logits, expected)
    for value in inputs.values():
        value.flags.writeable = False
    assert np.array_equal(executor.step(*inputs.values(), pool).logits, expected)


@pytest.mark.parametrize("name", [*(backend.name for backend in BACKENDS), "hosted"])
def test_one_tokens_logits_a_row_are_those_of_all(executors: Callable[[str], Any], name: str) -> None:
    """Keys and values are all there either way; a place outside the row is refused."""
    executor = executors(name)
    pool, inputs = executor.new_pool(SLOTS), good(executor)
    batch, count = inputs["token_ids"].shape
    whole = executor.step(*inputs.values(), pool)
    last = np.arange(batch) % count
    picked = executor.step(*inputs.values(), pool, last=last)
    assert picked.logits.shape == (batch, 1, executor.config.vocab_size)
    np.testing.assert_allclose(picked.logits[:, 0], np.array(whole.logits)[np.arange(batch), last], atol=2e-5)
    slots, columns = np.arange(batch * count), np.tile(np.arange(count), batch)
    kept: list[Any] = []
    for asked in (None, last):
        fresh = executor.new_pool(SLOTS)
        output = executor.step(*inputs.values(), fresh, last=asked)
        fresh.write(slots, output.new_k, output.new_v, rows=np.repeat(np.arange(batch), count), columns=columns)
        kept.append(fresh.read(slots))
    np.testing.assert_array_equal(kept[0], kept[1])
    for wrong in (last + count, last - count, last[:-1], last.astype(np.int32)):
        with pytest.raises(InputRefused, match="last"):
            executor.step(*inputs.values(), pool, last=wrong)


@pytest.mark.parametrize("name", [*(backend.name for backend in BACKENDS), "hosted"])
def test_a_foreign_pool_is_refused(executors: Callable[[str], Any], name: str) -> None:
    """A pool of other numbers, width or depth would be read as foreign memory."""
    executor = executors(name)

    class Stranger:
        num_slots = SLOTS

    with pytest.raises(InputRefused):
        executor.step(*good(executor).values(), Stranger())


def test_what_can_abort_can_be_hosted() -> None:
    for backend in BACKENDS:
        if backend.can_abort:
            assert backend.abilities["own_process"].support is Support.SUPPORTED, backend.name
