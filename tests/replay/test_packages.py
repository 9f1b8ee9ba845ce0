"""A replay under other compiler pins runs the package that changes the least, or is refused by the pin."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from manifests.canonical import digest
from manifests.compiler import CompilerManifest
from replay.errors import PinRefused
from replay.packages import Candidate, PackageChoice
from replay.substitutes import Substitution, parse_substitutions
from tests.replay.pins import made_up_pins

RECORDED = digest(b"p")


def _candidate(name: str, *, model: bytes = b"m", **compiler: object) -> Candidate:
    pins = made_up_pins()
    fields: dict[str, object] = {"backend": "eager", "backend_version": "1", "precision": "float32", **compiler}
    artifact = pins.artifact.model_copy(update={"model_digest": digest(model), "package_digest": digest(name.encode())})
    return Candidate(digest=digest(name.encode()), artifact=artifact, compiler=CompilerManifest(**fields))  # type: ignore[arg-type]


SHELF = (
    _candidate("p"),
    _candidate("narrow", precision="bfloat16"),
    _candidate("fast", backend="inductor", flags={"freezing": "false"}),
    _candidate("frozen", backend="inductor", flags={"freezing": "true"}),
    _candidate("fast narrow", backend="inductor", precision="bfloat16", flags={"freezing": "false"}),
    _candidate("ort", backend="onnxruntime", flags={"session.disable_prepacking": "1"}),
    _candidate("stranger", model=b"other", precision="int8"),
)


def _choose(*settings: str) -> str:
    choice = PackageChoice(substitutions=parse_substitutions(settings), candidates=SHELF)
    return choice.choose(RECORDED, made_up_pins())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], "p"),
        (["generation.seed=2"], "p"),
        (["compiler.precision=bfloat16"], "narrow"),
        (["compiler.backend=inductor", "compiler.flags.freezing=true"], "frozen"),
        (["compiler.backend=inductor", "compiler.precision=bfloat16"], "fast narrow"),
        (["compiler.flags.disable_prepacking=1"], "ort"),
        ([f"artifact.package_digest={digest(b'ort')[:20]}"], "ort"),
    ],
)
def test_the_fitting_package_with_the_fewest_other_changes_is_chosen(settings: list[str], name: str) -> None:
    assert _choose(*settings) == digest(name.encode())


@pytest.mark.parametrize(
    ("setting", "pin"),
    [
        ("compiler.precision=int8", "compiler.precision"),
        ("compiler.backend=abacus", "compiler.backend"),
        ("artifact.package_digest=sha256:", "artifact.package_digest"),
    ],
)
def test_what_no_package_has_is_refused_by_its_pin(setting: str, pin: str) -> None:
    with pytest.raises(PinRefused) as caught:
        _choose(setting)
    assert caught.value.pin == pin


def test_a_missing_package_is_prepared_once_where_that_is_possible() -> None:
    made: list[str] = []

    def prepare(
        *, base: Candidate | None, model_digest: str, wanted: CompilerManifest, asked: Sequence[Substitution]
    ) -> Candidate:
        assert base is not None
        assert base.digest == RECORDED
        made.append(wanted.precision)
        return _candidate("made", precision=wanted.precision)

    substitutions = parse_substitutions(["compiler.precision=int4"])
    choice = PackageChoice(substitutions=substitutions, candidates=SHELF, prepare=prepare)
    for _ in range(2):
        assert choice.choose(RECORDED, made_up_pins()) == digest(b"made")
    assert made == ["int4"]
