"""The table of backends is complete, and what it does not support is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from runtime.backends import registry
from runtime.backends.buckets import default_plan
from runtime.backends.contract import Bounds
from runtime.backends.errors import BackendMissing, BackendRefused
from runtime.backends.protocol import ABILITIES, Ability, BuildOptions, Support, abilities
from traces.failures import FailureClass


def test_every_cell_is_filled_and_every_no_has_a_reason() -> None:
    for backend in registry.BACKENDS:
        assert set(backend.abilities) == set(ABILITIES)
        for cell in backend.abilities.values():
            assert cell.support is Support.SUPPORTED or cell.reason
        assert set(backend.runtime_libraries) <= set(backend.libraries)


def test_an_incomplete_table_or_a_bare_no_is_an_error() -> None:
    with pytest.raises(ValueError, match="abilities differ"):
        abilities(float32=Ability(Support.SUPPORTED))
    cells = dict.fromkeys(ABILITIES, Ability(Support.SUPPORTED))
    with pytest.raises(ValueError, match="without a reason"):
        abilities(**{**cells, "int8": Ability(Support.NEVER)})


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendRefused, match="eager, onnxruntime, inductor, executorch, iree, xla"):
        registry.backend_named("tensorrt")


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        ("onnxruntime", BuildOptions(precision="bfloat16"), "no bfloat16 MatMul"),
        ("eager", BuildOptions(precision="int8"), "int8"),
        ("eager", BuildOptions(precision="float8"), "float8"),
        ("onnxruntime", BuildOptions(optimization="o3"), "o3"),
        ("inductor", BuildOptions(flags={"freezing": "maybe"}), "freezing"),
        ("eager", BuildOptions(flags={"freezing": "true"}), "freezing"),
        ("eager", BuildOptions(norm="layer"), "layer"),
        ("inductor", BuildOptions(threads=0), "threads"),
        ("xla", BuildOptions(flags={"specialization": "never"}), "specialization"),
        ("xla", BuildOptions(precision="int8"), "int8"),
        ("eager", BuildOptions(providers=("CPUExecutionProvider",)), "providers"),
        ("iree", BuildOptions(precision="bfloat16"), "bfloat16"),
        ("executorch", BuildOptions(precision="bfloat16"), "no bfloat16"),
        ("executorch", BuildOptions(flags={"delegate": "coreml"}), "delegate"),
        ("iree", BuildOptions(flags={"target_cpu": "pentium9000"}), "target_cpu"),
        ("eager", BuildOptions(buckets=default_plan(Bounds())), "its shapes are dynamic"),
    ],
)
def test_what_a_backend_does_not_offer_is_refused(
    tmp_path: Path, backend: str, options: BuildOptions, said: str
) -> None:
    with pytest.raises(BackendRefused, match=said) as caught:
        registry.backend_named(backend).start(tmp_path, tmp_path, options)
    assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
    assert caught.value.fix


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(registry, "version", absent)
    with pytest.raises(BackendMissing, match="onnxruntime") as caught:
        registry.backend_named("onnxruntime").start(tmp_path, tmp_path, BuildOptions())
    assert "pip install" in (caught.value.fix or "")


def test_where_nothing_can_be_set_the_fix_is_to_leave_it_out_and_no_empty_list() -> None:
    nothing = {"providers": ("A",), "buckets": default_plan(Bounds()), "flags": {"recipe": "tile"}}
    for backend in registry.BACKENDS:
        for name, value in nothing.items():
            try:
                backend.check(replace(BuildOptions(), **{name: value}))
            except BackendRefused as refusal:
                assert "none" not in (refusal.fix or "")
                if name != "flags" or "recipe" in backend.flags:
                    assert refusal.fix == "leave it out: there is nothing to set"
