"""Are the committed reference weights the measured ones, a standard Llama checkpoint, and as good as the card says?"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.models.reference import evaluate, task

FOLDER = Path(evaluate.__file__).parent
LARGEST = 12_000_000  # bytes
# the card's shares of calls and answers, less what a sample of forty questions may be below them
DRAWN, RETRIEVED = (0.70, 0.88), (0.95, 0.93)


@pytest.fixture(scope="module")
def writer() -> evaluate.Writer:
    return evaluate.Writer(FOLDER)


def test_weights_are_those_of_the_card() -> None:
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) <= LARGEST
    assert hashlib.sha256(weights).hexdigest() in (FOLDER / "MODEL_CARD.md").read_text("utf-8")


def test_tokenizer_is_that_of_the_card() -> None:
    tokenizer = (FOLDER / "tokenizer.json").read_bytes()
    assert hashlib.sha256(tokenizer).hexdigest() in (FOLDER / "MODEL_CARD.md").read_text("utf-8")


@pytest.mark.parametrize(("draw", "least"), [(evaluate.drawn_examples, DRAWN), (evaluate.desk_examples, RETRIEVED)])
def test_held_out_sample_reaches_the_card(
    writer: evaluate.Writer, draw: Callable[[int, int], list[task.Example]], least: tuple[float, float]
) -> None:
    shares, _ = evaluate.score(writer, draw(1, 40))
    for measure, share in zip(("tool call", "cited answer"), least, strict=True):
        right, total = shares[measure]
        assert right >= share * total, f"{measure}: {right} of {total}"


def test_cached_logits_equal_those_of_the_training_forward(writer: evaluate.Writer) -> None:
    tokens = torch.randint(8, 768, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = writer.network.new_cache(rows=2, positions=24)
    rows, positions = torch.arange(2), torch.arange(24).expand(2, -1)
    with torch.no_grad():
        whole = writer.network(tokens)
        first = writer.network.cached(tokens[:, :20], positions[:, :20], cache, rows)
        rest = writer.network.cached(tokens[:, 20:], positions[:, 20:], cache, rows)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, atol=1e-4, rtol=1e-4)


def test_transformers_loads_the_checkpoint_and_agrees(writer: evaluate.Writer) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    drawn = task.example(random.Random(3), "held_out")
    tokens = torch.tensor([writer.tokenizer.encode(evaluate.cases_of(0, drawn)[0].prompt).ids])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, writer.network(tokens), atol=1e-4, rtol=1e-4)


def test_wilson_interval_of_a_textbook_case() -> None:
    low, high = evaluate.wilson(81, 263)  # Newcombe, Statistics in Medicine 17 (1998): 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
