"""Context that stays in place between steps changes no bit of an answer, on ONNX Runtime itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtime.backends.errors import BackendRefused
from runtime.backends.hosted_process import Hosting
from runtime.backends.onnxruntime_loader import executor_of
from runtime.backends.protocol import BuildOptions
from runtime.models.random_checkpoint import random_checkpoint
from runtime.prepare.load import load_package
from runtime.prepare.pipeline import PreparedPackage, prepare
from runtime.prepare.store import PackageStore
from tests.runtime.prepare.conftest import BOUNDS

SLOTS, ROOM, BAD = 96, 16, 319
TABLES = np.random.default_rng(1).permutation(SLOTS).reshape(6, ROOM).astype(np.int64)
"""Each sequence's slots: so many may live at once."""


class Session:
    """A few sequences on one executor and pool, each a list of tokens of which all but the last are in the cache."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.pool = executor, executor.new_pool(SLOTS)
        self.draw = np.random.default_rng(2)
        self.lengths = dict.fromkeys(range(len(TABLES)), 0)

    def call(self, sequences: list[int], count: int, *, pool: Any = None) -> Any:
        """Run a call of `count` tokens for each sequence; the tokens follow from sequence and position."""
        lengths = np.array([self.lengths[one] for one in sequences], dtype=np.int64)
        positions = lengths[:, None] + np.arange(count)
        tokens = (positions * 7 + np.array(sequences)[:, None] * 3) % self.executor.config.vocab_size
        width = max(8, -(-int(lengths.max()) // 8) * 8)
        slots = np.zeros((len(sequences), width), dtype=np.int64)
        for row, (one, length) in enumerate(zip(sequences, lengths.tolist(), strict=True)):
            slots[row, :length] = TABLES[one, :length]
        return self.executor.step(tokens, positions, slots, lengths, pool or self.pool)

    def keep(self, sequences: list[int], count: int, output: Any) -> None:
        """Put a call's keys and values away."""
        rows = np.repeat(np.arange(len(sequences)), count)
        columns = np.tile(np.arange(count), len(sequences))
        ids = np.concatenate([TABLES[one, self.lengths[one] : self.lengths[one] + count] for one in sequences])
        self.pool.write(ids, output.new_k, output.new_v, rows=rows, columns=columns)
        for one in sequences:
            self.lengths[one] += count

    def other_pool(self) -> Any:
        """Copy what is cached into a pool that no step has seen."""
        fresh, ids = self.executor.new_pool(SLOTS), np.arange(SLOTS)
        k, v = (side[:, None] for side in self.pool.read(ids))
        fresh.write(ids, k, v, rows=np.zeros(SLOTS, dtype=np.int64), columns=ids)
        return fresh


def load(prepared: Callable[..., PreparedPackage], store: PackageStore, precision: str = "float32", **more: Any) -> Any:
    return load_package(store, prepared("onnxruntime", precision).digest, **more).executor


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_answer_is_that_of_a_pool_that_no_step_has_seen(
    prepared: Callable[..., PreparedPackage], store: PackageStore, precision: str
) -> None:
    session = Session(load(prepared, store, precision))
    draw = np.random.default_rng(3)
    for _ in range(120):
        count = int(draw.choice([1, 1, 1, 4]))
        able = [one for one, length in session.lengths.items() if length + count <= ROOM]
        for one in set(session.lengths) - set(able):  # full: it ends, and another one takes its slots
            session.lengths[one] = 0
        if not able:
            continue
        sequences = draw.permutation(able)[: draw.integers(1, len(able) + 1)].tolist()
        cold = session.call(sequences, count, pool=session.other_pool())
        warm = session.call(sequences, count)
        for name in ("logits", "new_k", "new_v"):
            np.testing.assert_array_equal(getattr(warm, name), getattr(cold, name), err_msg=name)
        if draw.random() < 0.8:  # now and then a call's answer is thrown away
            session.keep(sequences, count, warm)


def test_rows_stay_in_place_while_their_sequences_go_on(
    prepared: Callable[..., PreparedPackage], store: PackageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.backends.resident import Tables

    session = Session(load(prepared, store))
    session.keep([0, 1, 2], 4, session.call([0, 1, 2], 4))
    session.keep([0, 1, 2], 1, session.call([0, 1, 2], 1))
    filled: list[int] = []
    monkeypatch.setattr(Tables, "fill", lambda self, rows, pool, slots, *, lengths: filled.extend(rows.tolist()))
    for _ in range(3):
        session.keep([0, 1, 2], 1, session.call([0, 1, 2], 1))
    assert filled == []
    session.keep([0, 2], 1, session.call([0, 2], 1))
    assert filled == [1]  # the second row is another sequence's now


def test_an_answer_is_written_over_only_where_nobody_holds_it(
    prepared: Callable[..., PreparedPackage], store: PackageStore
) -> None:
    session = Session(load(prepared, store))
    session.keep([0, 1], 4, session.call([0, 1], 4))
    places: list[int] = []
    for _ in range(3):
        output = session.call([0, 1], 1)
        places.append(output.logits.ctypes.data)
        session.keep([0, 1], 1, output)
        del output
    assert len(set(places)) == 1  # new memory would cost more than the copy that is spared
    held = session.call([0, 1], 1)
    session.keep([0, 1], 1, held)
    first, before = held.logits[:1, 0], held.logits.copy()
    del held
    assert not np.array_equal(session.call([0, 1], 1).logits, before)
    np.testing.assert_array_equal(first, before[:1, 0])


def test_an_answer_that_is_no_number_reaches_nobody_else(tmp_path: Path, store: PackageStore) -> None:
    folder = random_checkpoint(tmp_path / "model", seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD] = np.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    package = prepare(folder, backend="onnxruntime", store=store, options=BuildOptions(bounds=BOUNDS))
    executor = load_package(store, package.digest).executor
    pool, one = executor.new_pool(SLOTS), np.zeros((1, 1), dtype=np.int64)

    def answer(token: int, length: int, used: Any) -> Any:
        at = np.full((1, 1), length, dtype=np.int64)
        return executor.step(one + token, at, TABLES[:1, :8].copy(), at[0], used)

    expected = answer(1, 0, executor.new_pool(SLOTS)).logits
    assert np.isnan(answer(BAD, 3, pool).logits).all()  # columns 0 to 2 hold zeros; its own are not kept
    np.testing.assert_array_equal(answer(1, 0, pool).logits, expected)
    chunk = np.array([[1, BAD, BAD, BAD]], dtype=np.int64)
    executor.step(chunk, np.arange(4)[None], TABLES[:1, :8].copy(), np.zeros(1, dtype=np.int64), pool)
    np.testing.assert_array_equal(answer(1, 0, pool).logits, expected)


def test_both_forms_of_the_step_agree(
    model_folder: Path, prepared: Callable[..., PreparedPackage], store: PackageStore
) -> None:
    options = BuildOptions(bounds=BOUNDS, flags={"context": "gathered"})
    gathered = prepare(model_folder, backend="onnxruntime", store=store, options=options)
    models: list[Any] = [
        load_package(store, package.digest) for package in (gathered, prepared("onnxruntime", "float32"))
    ]
    assert [model.compiler.flags["context"] for model in models] == ["gathered", "resident"]
    spec = replace(models[0].executor.spec, flags={"context": "resident"})
    with pytest.raises(BackendRefused, match="earlier version"):
        executor_of(models[0].executor.loaded, spec)
    sessions = [Session(model.executor) for model in models]
    for count in (4, 1, 1, 3, 1):
        outputs = [session.call([0, 1, 2], count) for session in sessions]
        np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=2e-5)
        for session, output in zip(sessions, outputs, strict=True):
            session.keep([0, 1, 2], count, output)


def test_a_hosted_step_gives_the_same_bits(prepared: Callable[..., PreparedPackage], store: PackageStore) -> None:
    here = Session(load(prepared, store))
    hosted = load(prepared, store, hosting=Hosting())
    try:
        there = Session(hosted)
        for count in (4, 1, 1, 1):
            outputs = [session.call([0, 1], count) for session in (here, there)]
            np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)
            for session, output in zip((here, there), outputs, strict=True):
                session.keep([0, 1], count, output)
    finally:
        hosted.close()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 4), ("qwen3", 1)])
def test_every_way_to_share_heads_is_prepared(
    family: str, kv_heads: int, invariant: bool, tmp_path: Path, store: PackageStore
) -> None:
    folder = random_checkpoint(tmp_path / "model", family=family, num_kv_heads=kv_heads, seed=4)
    options = BuildOptions(bounds=BOUNDS, batch_invariant=invariant)
    assert load_package(store, prepare(folder, backend="onnxruntime", store=store, options=options).digest)
