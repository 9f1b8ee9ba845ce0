"""Each setting of a preparation changes exactly the choice that it names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replay.errors import PinRefused
from replay.preparation_pins import change_options, parse_choices
from runtime.backends.buckets import parse_plan
from runtime.backends.contract import Bounds
from runtime.backends.protocol import BuildOptions

BASE = BuildOptions(optimization="basic", flags={"disable_prepacking": "1"}, bounds=Bounds(max_batch=8))


def changed(*settings: str) -> tuple[str, BuildOptions]:
    return change_options("onnxruntime", BASE, parse_choices(settings))


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("compiler.precision=bfloat16", replace(BASE, precision="bfloat16")),
        ("artifact.quantization=int8", replace(BASE, precision="int8")),
        ("artifact.quantization=none", BASE),
        ("compiler.optimization_level=all", replace(BASE, optimization="all")),
        ("compiler.execution_providers=A, B", replace(BASE, providers=("A", "B"))),
        ("compiler.flags.norm=unfused", replace(BASE, norm="unfused")),
        ("compiler.flags.session.memory_pattern=1", replace(BASE, flags={**BASE.flags, "memory_pattern": "1"})),
        ("compiler.bounds.max_context=64", replace(BASE, bounds=Bounds(max_batch=8, max_context=64))),
        ("compiler.batch_invariant=true", replace(BASE, batch_invariant=True)),
        ("compiler.buckets=decode=1,8", replace(BASE, buckets=parse_plan("decode=1,8", BASE.bounds))),
        ("hardware.threads=2", replace(BASE, threads=2)),
        ("compiler.onnxruntime=1.30.0", BASE),
    ],
)
def test_a_setting_changes_its_own_choice_and_no_other(setting: str, options: BuildOptions) -> None:
    assert changed(setting) == ("onnxruntime", options)


def test_another_backend_starts_from_its_own_level_flags_and_providers() -> None:
    backend, options = changed("compiler.backend=inductor", "compiler.flags.freezing=true")
    assert (backend, options.optimization, dict(options.flags)) == ("inductor", "default", {"freezing": "true"})
    assert options.bounds == BASE.bounds, "bounds are the model's use, not the backend's"


@pytest.mark.parametrize("setting", ["hardware.threads=many", "compiler.bounds.max_batch=0", "compiler.buckets=rows=1"])
def test_a_value_that_cannot_be_read_is_refused_by_its_pin(setting: str) -> None:
    with pytest.raises(PinRefused) as caught:
        changed(setting)
    assert caught.value.pin == setting.partition("=")[0]
