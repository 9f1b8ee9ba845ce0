"""Scorecards: one JSON verdict with its exit code, and the pins that can have caused it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest

from eval.attribution import PIN_LAYERS, attribute, layers_of
from eval.divergence import Divergence, compare
from eval.layers import LAYERS, Layer
from eval.records import FailureRecord, GenerationRecord, RequestRecord, SpanRecord, TokenRecord
from eval.scorecard import refuse, score, summarize, tally
from manifests.diff import PinDifference
from manifests.run import MANIFESTS

ORIGINAL = RequestRecord(
    "req_1",
    "run_1",
    generations=(GenerationRecord("prompt", (TokenRecord(5, "a", step=3), TokenRecord(6, "b", step=4)), "stop"),),
    terminal_status="ok",
    spans=(SpanRecord("request", 10, 60),),
)
TOKENS = ORIGINAL.generations[0].tokens
REPLAY = replace(
    ORIGINAL,
    run_id="run_2",
    generations=(replace(ORIGINAL.generations[0], tokens=(TOKENS[0], replace(TOKENS[1], logits_digest="c"))),),
)
PRECISION = PinDifference("compiler", "precision", "float32", "bfloat16")
SEED = PinDifference("generation", "seed", 1, 2)


def test_a_diverged_replay_says_where_and_names_its_pins() -> None:
    card = score(compare(ORIGINAL, REPLAY), ORIGINAL, REPLAY, pins_changed=[SEED, PRECISION])
    document = json.loads(json.dumps(card.to_document(), allow_nan=False))
    stable = list(document)[:9]
    assert stable == [
        "verdict",
        "layer",
        "stage",
        "step",
        "token_index",
        "pins_changed",
        "refused_pin",
        "original",
        "replay",
    ]
    assert {key: document[key] for key in stable[:7]} == {
        "verdict": "diverged",
        "layer": "bits",
        "stage": "b06",
        "step": 4,
        "token_index": 1,
        "pins_changed": [
            {"pin": "generation.seed", "original": 1, "replay": 2},
            {"pin": "compiler.precision", "original": "float32", "replay": "bfloat16"},
        ],
        "refused_pin": None,
    }
    assert document["original"]["run_id"] == "run_1"
    assert document["replay"]["tokens"] == 2
    assert [item["role"] for item in document["suspects"]] == ["direct", "downstream"]
    assert card.exit_code == 1


def test_exit_codes_follow_the_verdict() -> None:
    exact = score(compare(ORIGINAL, ORIGINAL), ORIGINAL, ORIGINAL)
    refused = refuse(ORIGINAL, pin="compiler.backend", reason="executorch is not installed")
    unverified = score(compare(ORIGINAL, replace(ORIGINAL, terminal_status=None)), ORIGINAL, ORIGINAL)
    near = score(Divergence("within_tolerance", "bits"), ORIGINAL, REPLAY)
    assert [card.exit_code for card in (exact, near, unverified, refused)] == [0, 0, 1, 2]
    assert refused.to_document()["refused_pin"] == "compiler.backend"
    assert refused.to_document()["layer"] is None
    assert score(Divergence("unverified", unverified=("no digest",)), ORIGINAL, REPLAY).reason == "no digest"


def test_a_tally_counts_and_takes_the_worst() -> None:
    cards = [score(compare(ORIGINAL, replay), ORIGINAL, replay) for replay in (ORIGINAL, REPLAY, ORIGINAL)]
    found = tally(cards)
    assert (found.verdicts, found.layers, found.exit_code) == ({"exact": 2, "diverged": 1}, {"bits": 1}, 1)
    assert tally([]).exit_code == 2


def test_a_summary_is_plain() -> None:
    failed = replace(ORIGINAL, failure=FailureRecord("shape_guard", "b05", "none"), terminal_status="error", spans=())
    document = summarize(failed)
    assert (document["failure_class"], document["failed_stage"], document["duration_us"]) == (
        "shape_guard",
        "b05",
        None,
    )
    assert summarize(ORIGINAL)["duration_us"] == 50


@pytest.mark.parametrize(
    ("pin", "layer", "role"),
    [
        (PRECISION, "bits", "direct"),
        (PRECISION, "margin", "direct"),
        (PRECISION, "token", "upstream"),
        (PRECISION, "input", "downstream"),
        (SEED, "token", "direct"),
        (SEED, "bits", "downstream"),
        (PinDifference("hardware", "environment.MKL_CBWR", None, "COMPATIBLE"), "bits", "direct"),
        (PinDifference("hardware", "environment.OMP_WAIT_POLICY", None, "PASSIVE"), "bits", "inert"),
        (PinDifference("hardware", "memory_bytes", 1, 2), "bits", "inert"),
        (PinDifference("context", "index_digest", "a", "b"), "input", "direct"),
        (PinDifference("context", "context_digest", "a", "b"), "input", "observed"),
        (PinDifference("context", "source_snapshots.P-1", "a", "b"), "input", "observed"),
        (PinDifference("policy", "policy_version", "1", "2"), "decision", "direct"),
        (PinDifference("scheduling", "max_num_seqs", 8, 4), "schedule", "direct"),
        (PRECISION, None, "upstream"),
    ],
)
def test_pins_are_ranked_by_what_they_can_do(pin: PinDifference, layer: Layer | None, role: str) -> None:
    verdict = "exact" if layer is None else "diverged"
    found = attribute([pin], Divergence(verdict, layer))
    assert found.suspects[0].role == role
    assert found.explained == (layer is None or role == "direct")
    assert found.direct == ((pin,) if role == "direct" else ())


def test_every_field_of_every_dimension_has_its_layers() -> None:
    assert set(get_args(Layer)) == set(LAYERS)
    for path, layers in PIN_LAYERS.items():
        dimension, _, field = path.partition(".")
        assert not field or field.partition(".")[0] in MANIFESTS[dimension].model_fields, path
        assert set(layers) <= set(LAYERS)
    assert set(MANIFESTS) <= set(PIN_LAYERS)
    assert layers_of("hardware.isa_flags") == ("bits",)
    assert layers_of("something.new") == LAYERS
