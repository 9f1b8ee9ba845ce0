"""One planted change for each of the nine preparation stages: the stage at which it enters must be named first.

Where a stage has a choice that a user can set, the plant sets it; elsewhere the toolchain is made to do another thing
at exactly that stage, in the way that a changed library or a damaged file would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.backends.fixture import FixtureOutput
from runtime.backends.registry import BACKENDS
from runtime.prepare import load, package, warm

STAGES = tuple(f"a{number:02d}" for number in range(1, 10))
Patch = Callable[[pytest.MonkeyPatch, str, Path], None]


@dataclass(frozen=True)
class Plant:
    """A change: settings of a replay, or a patch of the toolchain."""

    what: str
    settings: tuple[str, ...] = ()
    patch: Patch | None = None


def lowering_of(backend: str) -> Any:
    """Return a backend's lowering class."""
    from importlib import import_module

    path = next(one.lowering for one in BACKENDS if one.name == backend)
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def before(stage: str, change: Callable[[Any], None]) -> Patch:
    """Change the program on its way just before a stage of the lowering."""

    def patch(monkeypatch: pytest.MonkeyPatch, backend: str, _: Path) -> None:
        kind = lowering_of(backend)
        original = getattr(kind, stage)

        def changed(self: Any) -> Any:
            change(self.program)
            return original(self)

        monkeypatch.setattr(kind, stage, changed)

    return patch


def dead_node(program: Any) -> None:
    """Add a node whose result nobody reads."""
    graph = program.exported.graph
    node = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_after(node):
        graph.call_function(torch.ops.aten.clone.default, (node,)).meta.update(node.meta)


def another_guard(program: Any) -> None:
    """Add a guard that every input passes."""
    program.exported._guards_code = [*program.exported._guards_code, "L['token_ids'].size()[0] <= 4096"]


def one_weight(program: Any) -> None:
    """Flip the last bit of one weight."""
    weight = next(iter(program.decoder.state_dict().values()))
    weight.view(-1).view(torch.int32 if weight.dtype is torch.float32 else torch.int16)[0] ^= 1


def other_tokenizer(monkeypatch: pytest.MonkeyPatch, _: str, folder: Path) -> None:
    """Ship another tokenizer file than the model's."""
    original = package.load_checkpoint

    def changed(place: Path) -> Any:
        found = original(place)
        assert found.tokenizer_path is not None
        other = folder / "tokenizer.json"
        other.write_bytes(found.tokenizer_path.read_bytes() + b"\n")
        return replace(found, tokenizer_path=other)

    monkeypatch.setattr(package, "load_checkpoint", changed)


def other_threads(monkeypatch: pytest.MonkeyPatch, _: str, __: Path) -> None:
    """Load with two compute threads."""
    original = load.load_package
    monkeypatch.setattr(load, "load_package", lambda store, digest, threads: original(store, digest, threads=2))


def other_threads_unseen(monkeypatch: pytest.MonkeyPatch, backend: str, folder: Path) -> None:
    """Load with two compute threads in a process whose pool has one and cannot be counted."""
    monkeypatch.setattr("runtime.backends.xla_platform.pool_threads", lambda: None)
    other_threads(monkeypatch, backend, folder)


def last_bit(monkeypatch: pytest.MonkeyPatch, _: str, __: Path) -> None:
    """Answer with the next larger number in one logit of the warm-up."""
    original = warm.run_fixture

    def changed(executor: Any) -> FixtureOutput:
        found = original(executor)
        first = found.logits[0].copy()
        first.flat[0] = np.nextafter(first.flat[0], np.float32(np.inf))
        return replace(found, logits=(first, *found.logits[1:]))

    monkeypatch.setattr(warm, "run_fixture", changed)


def in_the_compiler(source: str) -> Patch:
    """Run code at the start of every Python process that the preparation starts."""

    def patch(monkeypatch: pytest.MonkeyPatch, _: str, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(source)
        import os

        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ".")]))

    return patch


def another_argument(phase: str, argument: str) -> Patch:
    """Give iree-compile one more argument in the phase that has `phase` among its arguments."""
    return in_the_compiler(
        "import subprocess\n"
        "run = subprocess.run\n"
        "def planted(words, *rest, **named):\n"
        f"    if {phase!r} in words:\n"
        f"        words = [*words, {argument!r}]\n"
        "    return run(words, *rest, **named)\n"
        "subprocess.run = planted\n"
    )


COMMON: Mapping[str, Plant] = {
    "a01": Plant("another RMS norm is exported", ("compiler.flags.norm=unfused",)),
    "a02": Plant("a dead node in the graph", patch=before("represent", dead_node)),
    "a03": Plant("another guard", patch=before("analyze", another_guard)),
    "a07": Plant("another tokenizer file", patch=other_tokenizer),
    "a08": Plant("two threads at load", patch=other_threads),
    "a09": Plant("one bit of one warm-up logit", patch=last_bit),
}
OWN: Mapping[str, Mapping[str, Plant]] = {
    "eager": {
        "a04": Plant("a dead node in the graph", patch=before("optimize", dead_node)),
        "a06": Plant("one bit of one weight", patch=before("lower", one_weight)),
    },
    "onnxruntime": {
        "a04": Plant("a lower level", ("compiler.optimization_level=basic",)),
        "a05": Plant(
            "another provider first", ("compiler.execution_providers=AzureExecutionProvider,CPUExecutionProvider",)
        ),
        "a06": Plant("no prepacking", ("compiler.flags.disable_prepacking=1",)),
    },
    "inductor": {
        "a04": Plant("frozen weights", ("compiler.flags.freezing=true",)),
        "a05": Plant(
            "a library kernel instead of a generated one",
            patch=in_the_compiler(
                "import sys\n"
                "if sys.argv[-1:] and any('inductor_compile' in word for word in sys.orig_argv):\n"
                "    import torch\n"
                "    from torch._inductor import lowering\n"
                "    lowering.make_fallback(torch.ops.aten.cos.default, override_decomp=True, warn=False)\n"
            ),
        ),
        "a06": Plant("narrower vectors", ("compiler.flags.simdlen=256",)),
    },
    "executorch": {
        "a04": Plant("one method for every call", ("compiler.flags.methods=single",)),
        "a05": Plant(
            "additions stay with the portable kernels",
            patch=in_the_compiler(
                "import sys\n"
                "if any('executorch_compile' in word for word in sys.orig_argv):\n"
                "    from executorch.backends.xnnpack.partition import config\n"
                "    known = config.ALL_PARTITIONER_CONFIGS\n"
                "    known[:] = [one for one in known if not one.target_name.startswith('add.')]\n"
            ),
        ),
        "a06": Plant("another memory plan", ("compiler.flags.memory_plan=naive",)),
    },
    "xla": {
        "a04": Plant("no fusion", ("compiler.flags.disabled_passes=fusion",)),
        "a06": Plant("a lower level of code generation", ("compiler.optimization_level=o1",)),
        "a08": Plant("two threads at load, where the system does not show them", patch=other_threads_unseen),
    },
    "iree": {
        "a04": Plant("a lower level", ("compiler.optimization_level=O1",)),
        "a05": Plant(
            "larger dispatches",
            patch=another_argument(
                "--compile-to=flow", "--iree-dispatch-creation-enable-aggressive-reshape-movement=true"
            ),
        ),
        "a06": Plant(
            "smaller tiles",
            patch=another_argument("--compile-from=flow", "--iree-llvmcpu-distribution-size=16"),
        ),
    },
}
DOES_NOT_APPLY: Mapping[tuple[str, str], str] = {
    ("eager", "a05"): "one owner runs everything; there is nothing to assign",
    ("xla", "a05"): "a library's fusions are marked by the passes of stage 4: whatever assigns otherwise enters there",
}


def plant_for(backend: str, stage: str) -> Plant | None:
    """Return the plant of one stage on one backend; None where the stage does not apply."""
    return None if (backend, stage) in DOES_NOT_APPLY else OWN.get(backend, {}).get(stage) or COMMON[stage]
