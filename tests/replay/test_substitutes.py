"""Every pin is brought about in one known way or refused by its name; nothing is set silently."""

from __future__ import annotations

import pytest

from manifests.run import DIMENSIONS
from replay.errors import PinRefused
from replay.substitutes import Way, apply_to_pins, check_values, parse_substitutions, pin_changes, tool_result
from tests.replay.pins import made_up_pins


def test_every_field_of_every_dimension_has_a_way_or_a_reason() -> None:
    pins = made_up_pins()
    for dimension in DIMENSIONS:
        for field in type(pins.dimension(dimension)).model_fields:
            pin = f"{dimension}.{field}"
            try:
                (substitution,) = parse_substitutions([f"{pin}=1"])
            except PinRefused as refusal:
                assert refusal.pin == pin
                assert refusal.fix
            else:
                assert substitution.pin == pin


@pytest.mark.parametrize(
    ("setting", "way"),
    [
        ("compiler.precision=bfloat16", Way.PACKAGE),
        ("compiler.flags.freezing=true", Way.PACKAGE),
        ("hardware.environment.ONEDNN_MAX_CPU_ISA=AVX2", Way.WORKER),
        ("hardware.threads=2", Way.WORKER),
        ("scheduling.max_num_seqs=4", Way.RESCHEDULE),
        ("generation.seed=9", Way.REPIN),
        ("policy.policy_version=support-desk/2", Way.REPIN),
        ("context.index_digest=other.sqlite", Way.RETRIEVAL),
        ('tools.result.lookup_account={"plan":"gold"}', Way.TOOL_RESULT),
    ],
)
def test_a_pin_is_brought_about_in_its_way(setting: str, way: Way) -> None:
    assert parse_substitutions([setting])[0].way is way


@pytest.mark.parametrize(
    ("settings", "pin"),
    [
        (["artifact.model_digest=sha256:0"], "artifact.model_digest"),
        (["hardware.cpu_model=other"], "hardware.cpu_model"),
        (["weather.rain=1"], "weather.rain"),
        (["scheduling.engine_id=e"], "scheduling.engine_id"),
        (["context.context_digest=x"], "context.context_digest"),
        (["tools.result.=1"], "tools.result."),
        (["generation.seed"], "generation.seed"),
        (["generation.seed=1", "generation.seed=2"], "generation.seed"),
    ],
)
def test_what_cannot_be_set_is_refused_by_its_pin(settings: list[str], pin: str) -> None:
    with pytest.raises(PinRefused) as caught:
        parse_substitutions(settings)
    assert caught.value.pin == pin


@pytest.mark.parametrize("setting", ["generation.seed=many", "hardware.threads=0", "generation.colour=1"])
def test_a_value_that_does_not_fit_is_refused_before_anything_runs(setting: str) -> None:
    with pytest.raises(PinRefused) as caught:
        check_values(made_up_pins(), parse_substitutions([setting]))
    assert caught.value.pin == setting.partition("=")[0]


def test_a_tool_result_must_be_json() -> None:
    with pytest.raises(PinRefused, match="not JSON"):
        check_values(made_up_pins(), parse_substitutions(["tools.result.lookup_account={gold}"]))
    good = parse_substitutions(['tools.result.lookup_account={"plan":"gold"}'])[0]
    assert tool_result(good) == ("lookup_account", {"plan": "gold"})


def test_changes_name_what_became_different_and_who_asked_for_it() -> None:
    before = made_up_pins()
    settings = ["generation.seed=1", "generation.temperature=0.8", 'tools.result.lookup_account={"plan":"gold"}']
    substitutions = parse_substitutions(settings)
    after = apply_to_pins(before, substitutions).set("hardware.environment.MKL_CBWR", "AVX2")
    found = pin_changes(before, after, substitutions)
    assert [(one["pin"], one["original"], one["replay"], one["set"]) for one in found] == [
        ("generation.temperature", "0", "0.8", True),
        ("tools.result.lookup_account", "as recorded", '{"plan":"gold"}', True),
        ("hardware.environment.MKL_CBWR", None, "AVX2", False),
    ]
    assert pin_changes(before, before, ()) == ()
