"""Where does a peer come from?  Each is installed once, in a folder of its own beside the environment.

Not into the environment: ONNX Runtime GenAI brings a native library that expects its own ONNX Runtime, and
llama-cpp-python is compiled here for this processor.  The versions below are the only place that says them.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Absent(Exception):
    """A peer that cannot be compared here, with the reason."""


class Install(NamedTuple):
    """What a peer needs beside the environment."""

    requirements: tuple[str, ...]
    """Pinned; the first is the peer itself."""
    compiled: bool = False
    """Whether it comes as source and needs a C and a C++ compiler (its build fetches cmake and ninja)."""


INSTALLS = {
    "onnxruntime-genai": Install(("onnxruntime-genai==0.18.0",)),
    "llama-cpp-python": Install(("llama-cpp-python==0.3.36", "diskcache==5.6.3", "gguf==0.19.0"), compiled=True),
}
BUILD = {
    "CMAKE_BUILD_PARALLEL_LEVEL": "1",
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DGGML_BLAS=OFF -DLLAVA_BUILD=OFF",
}
"""One compute thread needs no OpenMP, whose barriers spin; the vision library is not compared."""
COMPILERS = (("CC", ("cc", "gcc", "clang"), "C compiler"), ("CXX", ("c++", "g++", "clang++"), "C++ compiler"))


def install(kind: str, cache: Path) -> list[Path]:
    """Install what the peer needs into `cache`, once a version, and return its import path; raises Absent."""
    wanted = INSTALLS.get(package := kind.partition(",")[0])
    if wanted is None:
        return []
    folder = cache / wanted.requirements[0].replace("==", "-")
    if folder.is_dir():
        return [folder]
    if wanted.compiled:
        _need_compilers()
        print(f"{package}: compiling it, once; five to ten minutes of one core", file=sys.stderr, flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # The wheel cache is left out: a wheel in it may have been compiled with other settings.
    quiet = ("-q", "--disable-pip-version-check", "--no-cache-dir")
    command = [sys.executable, "-m", "pip", "install", *quiet, "--no-deps", "--target", str(unfinished)]
    if wanted.compiled:
        command += ["--no-binary", package]
    done = subprocess.run(
        [*command, *wanted.requirements],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **BUILD},
    )
    if done.returncode:
        raise Absent(f"not installed: {reason(done.stderr)}")
    unfinished.rename(folder)
    return [folder]


def reason(output: str) -> str:
    """Give what pip's output says of the cause: the first error of a build, else pip's last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if line.startswith("CMake Error"):  # the message stands below its place
            return f"{line} {after}".strip()
        if " error: " in line:
            return line
    return (lines or ["pip gave no reason"])[-1]


def _need_compilers() -> None:
    for variable, names, what in COMPILERS:
        asked = shlex.split(os.environ.get(variable, ""))[:1]
        if not any(shutil.which(name) for name in asked or names):
            looked = asked[0] if asked else ", ".join(names)
            raise Absent(f"not built: it comes as source, and there is no {what} here (looked for {looked})")
