"""Another version of a toolchain runs in an environment of its own, or the pin is refused and nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replay import environments
from replay.cli import main
from replay.environments import environment_for, installed, make_lock
from replay.errors import PinRefused
from replay.substitutes import Substitution, Way, parse_substitutions, way_of
from tests.replay.recorded import Recorded

OTHER = "1.30.0"
"""A version of ONNX Runtime that is not the installed one."""


def asked(version: str, library: str = "onnxruntime") -> tuple[Substitution, ...]:
    return parse_substitutions([f"compiler.{library}={version}"])


def left_over(cache: Path) -> list[str]:
    folder = cache / "environments"
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def test_a_version_that_nobody_has_is_refused_by_its_pin_in_good_time(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(PinRefused) as caught:
        environment_for(asked("999.0.1"), cache=tmp_path, deadline_seconds=90)
    assert caught.value.pin == "compiler.onnxruntime"
    assert "999.0.1" in caught.value.message
    assert time.monotonic() - start < 120
    assert left_over(tmp_path) == [], "a failed environment leaves nothing"


@pytest.mark.parametrize("version", ["", "newest", "1.30.0 --index-url=http://x", "-r /etc/passwd", "1.0; rm"])
def test_what_is_no_version_never_reaches_the_installer(tmp_path: Path, version: str) -> None:
    with pytest.raises(PinRefused, match="no version"):
        environment_for(asked(version), cache=tmp_path)


def test_the_installed_version_needs_no_environment(tmp_path: Path) -> None:
    found = environment_for(asked(str(installed("onnxruntime"))), cache=tmp_path)
    assert (found.interpreter, found.lock) == (sys.executable, None)
    assert left_over(tmp_path) == []


def test_a_lock_names_every_version_and_changes_with_each() -> None:
    lock = make_lock({"onnxruntime": OTHER})
    assert lock["pinned"] == {"onnxruntime": OTHER}
    assert "onnxruntime" not in lock["base"]
    assert lock["base"]["torch"] == installed("torch")


def test_a_library_that_does_not_import_is_refused_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(python: Path, *_: object) -> list[dict[str, str]]:
        place = next((python.parents[1] / "lib").iterdir()) / "site-packages" / "onnxruntime"
        place.mkdir()
        (place / "__init__.py").write_text("raise ImportError('needs another numpy')")
        return []

    monkeypatch.setattr(environments, "_install", broken)
    with pytest.raises(PinRefused, match="needs another numpy"):
        environment_for(asked(OTHER), cache=tmp_path)
    assert left_over(tmp_path) == []


def test_an_environment_overrides_one_library_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[str] = []

    def made_up(python: Path, pinned: dict[str, str], *_: object) -> list[dict[str, str]]:
        builds.append(str(pinned))
        place = next((python.parents[1] / "lib").iterdir()) / "site-packages"
        (place / "onnxruntime").mkdir()
        (place / "onnxruntime" / "__init__.py").write_text("")
        (place / f"onnxruntime-{OTHER}.dist-info").mkdir()
        (place / f"onnxruntime-{OTHER}.dist-info" / "METADATA").write_text(f"Name: onnxruntime\nVersion: {OTHER}\n")
        return []

    monkeypatch.setattr(environments, "_install", made_up)
    found = environment_for(asked(OTHER), cache=tmp_path)
    again = environment_for(asked(OTHER), cache=tmp_path)
    assert again == found
    assert len(builds) == 1, "it is kept"
    program = (
        "import json, importlib.metadata as m, replay, numpy;"
        "print(json.dumps([m.version('onnxruntime'), m.version('numpy'), replay.__file__]))"
    )
    code, said = environments._run([found.interpreter, "-c", program], seconds=60)
    assert code == 0, said
    assert json.loads(said)[:2] == [OTHER, installed("numpy")]
    code_root = str(Path(environments.__file__).parents[1])
    assert found.variables({"PYTHONPATH": "elsewhere"})["PYTHONPATH"] == os.pathsep.join([code_root, "elsewhere"])


@pytest.fixture
def empty_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package without content instead of asking an index."""

    def made_up(python: Path, *_: object) -> list[dict[str, str]]:
        place = next((python.parents[1] / "lib").iterdir()) / "site-packages" / "onnxruntime"
        place.mkdir()
        (place / "__init__.py").write_text("")
        return []

    monkeypatch.setattr(environments, "_install", made_up)


def _age(found: environments.Environment, seconds: int) -> Path:
    """Let an environment have been used so many seconds ago; returns its folder."""
    folder = Path(found.interpreter).parents[1]
    used = time.time() - seconds
    os.utime(folder / "lock.json", (used, used))
    return folder


@pytest.mark.usefixtures("empty_installs")
def test_the_environments_that_were_unused_longest_are_removed_when_another_is_made(tmp_path: Path) -> None:
    versions = ("1.0.1", "1.0.2", "1.0.3")
    made = [environment_for(asked(version), cache=tmp_path, kept=3) for version in versions]
    folders = [_age(found, 500 - 100 * place) for place, found in enumerate(made)]
    stale, fresh = (tmp_path / "environments" / name for name in (".staging-stale", ".staging-fresh"))
    stale.mkdir()
    fresh.mkdir()
    os.utime(stale, (0, 0))
    assert environment_for(asked(versions[0]), cache=tmp_path, kept=3) == made[0], "used again: now the newest"
    newest = Path(environment_for(asked("1.0.4"), cache=tmp_path, kept=3).interpreter).parents[1]
    assert set(left_over(tmp_path)) == {newest.name, folders[0].name, folders[2].name, fresh.name}


@pytest.mark.usefixtures("empty_installs")
def test_an_environment_in_which_something_runs_is_not_removed(tmp_path: Path) -> None:
    running, idle = (environment_for(asked(version), cache=tmp_path, kept=1) for version in ("1.0.1", "1.0.2"))
    assert left_over(tmp_path) == [Path(idle.interpreter).parents[1].name]
    running = environment_for(asked("1.0.1"), cache=tmp_path, kept=2)
    folders = [_age(running, 900), _age(idle, 800)]
    with subprocess.Popen([running.interpreter, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        newest = Path(environment_for(asked("1.0.3"), cache=tmp_path, kept=1).interpreter).parents[1]
        assert set(left_over(tmp_path)) == {folders[0].name, newest.name}
        worker.communicate(b"\n")


def test_a_command_that_does_not_end_is_ended() -> None:
    start = time.monotonic()
    code, said = environments._run(
        [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], seconds=2
    )
    assert (code, said.strip()) == (None, "begun")
    assert time.monotonic() - start < 20


def test_versions_are_pins_of_the_compiler_and_unknown_ones_list_the_known() -> None:
    assert way_of("compiler.jax") is Way.VERSION
    assert parse_substitutions(["compiler.iree=3.12.0"])[0].paths == (
        "compiler.runtime_versions.iree-base-compiler",
        "compiler.runtime_versions.iree-base-runtime",
    )
    with pytest.raises(PinRefused) as caught:
        way_of("compiler.tensorrt")
    assert "compiler.onnxruntime" in str(caught.value.fix)


@pytest.mark.slow
def test_a_request_and_a_preparation_run_under_another_version_of_onnx_runtime(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REPLAYLAB_CACHE", str(tmp_path))
    place = ["--ledger", str(recorded.path), "--json"]
    request = recorded.references()[0]
    settings = ["--set", "compiler.backend=onnxruntime", "--set", f"compiler.onnxruntime={OTHER}"]
    code = main(["run", request, *settings, *place])
    printed = json.loads(capsys.readouterr().out)
    assert code in (0, 1), printed
    assert printed["verdict"] in ("within_tolerance", "diverged"), "what ran under another version is never exact"
    versions = {pin["pin"]: pin["replay"] for pin in printed["pins_changed"] if pin["set"]}
    assert versions["compiler.runtime_versions.onnxruntime"] == OTHER
    assert (
        main(["run", request, "--set", "compiler.backend=onnxruntime", "--set", "compiler.onnxruntime=1.22.0", *place])
        == 2
    )
    printed = json.loads(capsys.readouterr().out)
    assert (printed["verdict"], printed["refused_pin"]) == ("refused", "compiler.onnxruntime")
