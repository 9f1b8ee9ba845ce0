"""How can a replay run another version of a toolchain?  An environment of its own, named by its lock and kept.

An environment holds the pinned libraries and nothing else; everything else, our own code included, comes from the
environment that runs now, and the lock says so version by version.  It is built beside its place and renamed into it,
so it is whole or not there.  What cannot be had (no such version, no index, no wheel for this machine, a library that
does not import) refuses the pin.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from manifests.canonical import canonical_bytes, digest
from replay.errors import PinRefused
from replay.substitutes import VERSIONED, Substitution, Way

CACHE_VARIABLE = "REPLAYLAB_CACHE"
DEADLINE_SECONDS = 600
IMPORT_SECONDS = 120
KEPT = 8
"""How many environments stay; each holds the whole of the libraries that it pins."""
STAGING = ".staging-"
ABANDONED_SECONDS = 3_600
"""A build that is older was killed: its deadlines are long past."""
LOCK = "lock.json"
"""Written last; its time is that of the last use."""
MODULES = {
    "executorch": "executorch.runtime",
    "iree": "iree.compiler, iree.runtime",
    "jax": "jax",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "torch": "torch",
}
"""What must import before an environment is taken for good."""
VERSION = re.compile(r"[0-9][0-9A-Za-z.!+]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a worker runs.

    interpreter  its Python
    lock         digest of all versions in it; None for the environment that runs now
    pinned       distributions that were asked for, with their versions
    """

    interpreter: str
    lock: str | None = None
    pinned: Mapping[str, str]

    def variables(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return a worker's environment variables: our own code first, wherever it runs from."""
        if self.lock is None:
            return dict(base)
        places = [str(Path(__file__).resolve().parents[1]), *filter(None, [base.get("PYTHONPATH")])]
        return {**base, "PYTHONPATH": os.pathsep.join(places)}


def environment_for(
    substitutions: Iterable[Substitution],
    *,
    cache: Path | None = None,
    on_progress: Callable[[str], None] = lambda state: None,
    deadline_seconds: int = DEADLINE_SECONDS,
    kept: int = KEPT,
) -> Environment:
    """Return the environment that has the versions that were asked for, building it the first time.

    Building one removes those that were unused longest, beyond `kept`, and in which nothing runs.

    Args:
        substitutions: those that ask for no version are left out.
        cache: folder for environments; by default REPLAYLAB_CACHE, or the user's cache folder.
        on_progress: told what is being done.
        deadline_seconds: building ends by then.
        kept: how many environments stay.
    Raises PinRefused naming the version that cannot be had, and why.
    """
    asked = [one for one in substitutions if one.way is Way.VERSION]
    pinned = dict(sorted(pair for one in asked for pair in wanted_versions(one).items()))
    if all(installed(name) == version for name, version in pinned.items()):
        return Environment(interpreter=sys.executable, pinned={})
    lock = make_lock(pinned)
    name = digest(lock)
    folder = (cache or cache_folder()) / "environments" / name.removeprefix("sha256:")[:32]
    environment = Environment(interpreter=str(folder / "bin" / "python"), lock=name, pinned=pinned)
    if not _is_whole(folder, name):
        _build(folder, lock, asked, on_progress=on_progress, deadline_seconds=deadline_seconds)
        _prune(folder, kept)
    with suppress(OSError):  # a cache that others may only read is used all the same
        os.utime(folder / LOCK)
    return environment


def wanted_versions(one: Substitution) -> dict[str, str]:
    """Return distribution to version for one `compiler.LIBRARY=VERSION`; PinRefused for what is no version."""
    if VERSION.fullmatch(one.value) is None:
        raise PinRefused(f"{one.value!r} is no version", pin=one.pin, fix="Give a whole version, such as 1.30.0.")
    return dict.fromkeys(VERSIONED[one.pin.removeprefix("compiler.")], one.value)


def make_lock(pinned: Mapping[str, str]) -> dict[str, Any]:
    """Name everything that such an environment runs: the pinned versions over those that are installed here."""
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    base = {name: version for name, version in found.items() if name and name not in pinned}
    return {
        "document": "replaylab.environment/1",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "site": sysconfig.get_path("purelib"),
        "pinned": dict(pinned),
        "base": dict(sorted(base.items())),
    }


def installed(distribution: str) -> str | None:
    """Return the version that runs in this process's environment; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Return the folder for what can be made again."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "replaylab"


def _is_whole(folder: Path, name: str) -> bool:
    """Tell whether an environment was built to its end and still has its interpreter."""
    try:
        lock = json.loads((folder / LOCK).read_bytes())["lock"]
    except (OSError, ValueError, KeyError):
        return False
    return digest(lock) == name and (folder / "bin" / "python").exists()


def _build(
    folder: Path,
    lock: Mapping[str, Any],
    asked: list[Substitution],
    *,
    on_progress: Callable[[str], None],
    deadline_seconds: int,
) -> None:
    """Build an environment beside its place and rename it; nothing is left of one that fails."""
    import venv

    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder.parent))
    try:
        on_progress("making an environment")
        venv.create(staging, symlinks=True, with_pip=False)
        python = staging / "bin" / "python"
        on_progress(f"installing {', '.join(f'{name} {version}' for name, version in lock['pinned'].items())}")
        report = _install(python, lock["pinned"], staging / "report.json", asked, deadline_seconds)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(staging), "platbase": str(staging)}))
        (site / "replaylab-base.pth").write_text(f"import site; site.addsitedir({lock['site']!r})\n")
        on_progress("importing it")
        _check_imports(python, asked)
        (staging / LOCK).write_bytes(canonical_bytes({"lock": dict(lock), "files": report}))
        _settle(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settle(staging: Path, folder: Path) -> None:
    """Rename into place; another process may have been faster, and a broken one is in the way of no other."""
    try:
        staging.rename(folder)
    except OSError:
        name = digest(json.loads((staging / LOCK).read_bytes())["lock"])
        if _is_whole(folder, name):
            return
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)


def _prune(newest: Path, kept: int) -> None:
    """Remove abandoned builds, and the environments that were unused longest; never the newest, or one that runs."""
    folders = [entry for entry in newest.parent.iterdir() if entry.is_dir()]
    builds = [entry for entry in folders if entry.name.startswith(STAGING)]
    for folder in builds:
        if time.time() - _used(folder) > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    others = sorted((one for one in folders if one not in (*builds, newest)), key=lambda one: -_used(one / LOCK, one))
    running = {word for process in psutil.process_iter(["cmdline"]) for word in (process.info["cmdline"] or [])[:1]}
    for folder in others[max(0, kept - 1) :]:
        if str(folder / "bin" / "python") not in running:
            (folder / LOCK).unlink(missing_ok=True)  # first, so that one half removed is not taken for whole
            shutil.rmtree(folder, ignore_errors=True)


def _used(*candidates: Path) -> float:
    """Return when the first of these that is there was written; the beginning of time where none is."""
    for path in candidates:
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _install(
    python: Path, pinned: Mapping[str, str], report: Path, asked: list[Substitution], deadline_seconds: int
) -> list[dict[str, str]]:
    """Install exactly these wheels, no source builds and no dependencies; returns each file's name and digest."""
    words = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-input"]
    words += ["--only-binary=:all:", "--ignore-installed", "--disable-pip-version-check", "--retries", "1"]
    words += ["--timeout", "30", "--report", str(report), *(f"{name}=={version}" for name, version in pinned.items())]
    code, said = _run(words, seconds=deadline_seconds)
    if code is None:
        raise _refused(asked, f"installing it took longer than {deadline_seconds} s", fix="Try again, or install it.")
    if code != 0:
        errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1] if errors else (said.strip().splitlines() or ["pip failed"])[-1]
        raise _refused(asked, f"it cannot be had here: {reason[:300]}", fix=_offered(said))
    entries = json.loads(report.read_bytes())["install"]
    report.unlink()
    return [
        {
            "name": entry["metadata"]["name"],
            "version": entry["metadata"]["version"],
            "file": str(entry["download_info"]["url"]).rsplit("/", 1)[-1],
            "sha256": entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", "unknown"),
        }
        for entry in entries
    ]


def _check_imports(python: Path, asked: list[Substitution]) -> None:
    for one in asked:
        modules = MODULES[one.pin.removeprefix("compiler.")]
        code, said = _run([str(python), "-W", "ignore", "-c", f"import {modules}"], seconds=IMPORT_SECONDS)
        if code != 0:
            last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
            raise _refused([one], f"it does not import beside the other libraries here: {last[:300]}")


def _run(words: list[str], *, seconds: int) -> tuple[int | None, str]:
    """Run a command in a session of its own; the code is None when it was ended at its deadline."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},  # what is tried out may be ONNX Runtime
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        return code, said.read()


def _offered(said: str) -> str:
    """Name the newest versions that the index offers, where pip listed them."""
    found = re.search(r"\(from versions: ([^)]+)\)", said)
    versions = [] if found is None or found.group(1) == "none" else found.group(1).split(", ")
    if not versions:
        return "Check the name of the version and that the package index can be reached."
    return f"The index has {', '.join(versions[-6:])}."


def _refused(asked: list[Substitution], reason: str, *, fix: str | None = None) -> PinRefused:
    one = asked[0]
    return PinRefused(f"{one.value}: {reason}", pin=one.pin, fix=fix or "Choose a version nearer to the recorded one.")
