"""Which graph passes did ONNX Runtime run, what did each change and cost, and what did each level leave?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from runtime.backends.errors import BackendRefused
from runtime.backends.onnxruntime import LEVELS, open_session, session_options
from runtime.backends.onnxruntime_log import session_log

DISABLED = "disable_optimizers"
"""The flag that names graph passes which must not run, separated by `;`."""
ENTRY = "optimization.disable_specified_optimizers"


@dataclass(frozen=True, kw_only=True)
class PassRun:
    """One run of the graph passes.

    names      in the order in which they ran; a pass of several rounds stands several times
    changed    those that modified the graph in any round
    pass_us    microseconds by name, from the time between log lines; None where the version has no log callback
    """

    names: tuple[str, ...]
    changed: frozenset[str]
    pass_us: Mapping[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """How the passes are run: everything that decides what they do."""

    level: str
    threads: int
    settings: Mapping[str, str]
    providers: tuple[str, ...]
    disabled: tuple[str, ...] = ()

    def rewrite(self, source: Path, optimized: Path) -> PassRun:
        """Rewrite `source` once into `optimized`; BackendRefused for a disabled pass that this level does not run."""
        if self.disabled:
            known = self._run(source, optimized, level=self.level, disabled=()).names
            self._check(known)
        return self._run(source, optimized, level=self.level, disabled=self.disabled)

    def nodes_by_level(self, source: Path, work: Path) -> dict[str, int]:
        """Count the nodes that each level up to the chosen one leaves, in order."""
        counts: dict[str, int] = {}
        for level in LEVELS:
            path = work / f"level-{level}.onnx"
            self._run(source, path, level=level, disabled=self.disabled)
            counts[level] = len(onnx.load(str(path), load_external_data=False).graph.node)
            path.unlink()
            if level == self.level:
                break
        return counts

    def _run(self, source: Path, optimized: Path, *, level: str, disabled: tuple[str, ...]) -> PassRun:
        options: Any = session_options(threads=self.threads, settings=self.settings, level=level)
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 0  # the transformers report at this level only
        if disabled:
            options.add_session_config_entry(ENTRY, ";".join(disabled))
        with session_log() as lines:
            open_session(source, options, self.providers)
        names: list[str] = []
        changed: set[str] = set()
        spent: dict[str, int] = {}
        before: int | None = None
        for at_ns, text in lines:
            found = re.search(r"GraphTransformer (\S+) modified: (\d)", text)
            if found:
                name = found.group(1)
                names.append(name)
                changed |= {name} if found.group(2) == "1" else set()
                if at_ns is not None and before is not None:
                    spent[name] = spent.get(name, 0) + (at_ns - before) // 1000
            before = at_ns
        timed = any(at_ns is not None for at_ns, _ in lines)
        return PassRun(names=tuple(names), changed=frozenset(changed), pass_us=spent if timed else None)

    def _check(self, known: tuple[str, ...]) -> None:
        strange = [name for name in self.disabled if name not in known]
        if strange:
            raise BackendRefused(
                f"no pass of level {self.level} is called {', '.join(strange)}",
                fix=f"choose from: {', '.join(dict.fromkeys(known))}",
                evidence={"operator_details": f"{DISABLED}={';'.join(strange)}"},
                stage="a04",
            )
