"""What does IREE say of its own work?  Operators, dimensions, passes, targets and code, read from its own output."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.backends.elf import text_section_bytes
from runtime.backends.lowering import unknown

INSTRUCTION_SETS = {
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "gfni": "gfni",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}
"""LLVM's name of each feature that arithmetic code may be made of, and the processor flag that shows it."""
ARGUMENT = re.compile(r"%arg(\d+): !torch\.vtensor<\[([^\]]*)\],(\w+)>")
"""The same in a module that has just been imported: index, dimensions, element."""
ELF = b"\x7fELF\x02\x01\x01"
IMPORT = re.compile(r"hal\.tensor\.import [^:\n]*%arg(\d+)[^:\n]*: !hal\.buffer_view -> tensor<([^>]*)>")
"""An input's index and its type, in a module that has been compiled part of the way."""
ELEMENT = {"si64": "i64", "si32": "i32", "si16": "i16", "si8": "i8", "ui8": "i8", "i1": "i1"}
"""Torch dialect integers, as the compiler's later dialects write them."""


def operators(operation: Any, walk_on: Any) -> dict[str, int]:
    """Count the operations of a module by name."""
    return dict(sorted(Counter(entry.name for entry in walk(operation, walk_on)).items()))


def unsupported(operation: Any, walk_on: Any) -> list[str]:
    """List what the importer carried over by name only: importing succeeds, compiling would not."""
    named = [entry for entry in walk(operation, walk_on) if entry.name == "torch.operator"]
    return sorted({str(entry.attributes["name"]).strip('"') for entry in named})


def walk(operation: Any, walk_on: Any) -> list[Any]:
    """List a module's operations; `walk_on` is the library's word for going on."""
    found: list[Any] = []

    def keep(entry: Any) -> Any:
        found.append(entry)
        return walk_on

    operation.walk(keep)
    return found


def imported_dimensions(text: str) -> dict[str, dict[str, str]]:
    """Read the inputs of every function of an imported module: index to `?x256xf32`."""
    found: dict[str, dict[str, str]] = {}
    for name, arguments in re.findall(r"func\.func @([\w$]+)\((.*?)\) ->", text):
        types: list[tuple[str, str, str]] = ARGUMENT.findall(arguments)
        found[name] = {
            index: "x".join([*filter(None, shape.split(",")), ELEMENT.get(kind) or kind])
            for index, shape, kind in types
        }
    return found


def compiled_dimensions(text: str) -> dict[str, dict[str, str]]:
    """Read the same from a module that has been compiled part of the way."""
    found: dict[str, dict[str, str]] = {}
    for chunk in text.split("util.func public @")[1:]:
        name = re.match(r"([\w$]+)\$async\(", chunk)
        if name is not None:
            imports = re.findall(
                r"hal\.tensor\.import [^:\n]*%arg(\d+)[^:\n]*: !hal\.buffer_view -> tensor<([^>]*)>", chunk
            )
            found[name.group(1)] = dict(imports)
    return found


def executables(text: str) -> list[str]:
    """Name the dispatches that the program was formed into; the name says what each computes."""
    return sorted(set(re.findall(r"flow\.executable\.export public @([\w$]+)", text)))


def target_of(text: str) -> dict[str, str]:
    """Read what code is made for from the module's own target attribute; empty where it has none."""
    found = re.search(r'#hal\.executable\.target<"([^"]+)", "([^"]+)", \{(.*)\}>', text)
    if found is None:
        return {}
    values = dict(re.findall(r'(\w+) = "([^"]*)"', found.group(3)))
    kept = {name: values[name] for name in ("cpu", "target_triple", "data_layout") if name in values}
    features = ",".join(f"+{name}" for name in enabled(values.get("cpu_features", "")))
    return {"backend": found.group(1), "format": found.group(2), **kept, "cpu_features": features}


def enabled(features: str) -> list[str]:
    """List the features that are on, sorted; a later `-name` takes back an earlier `+name`."""
    wanted: dict[str, bool] = {}
    for entry in features.split(","):
        if entry[:1] in ("+", "-"):
            wanted[entry[1:]] = entry.startswith("+")
    return sorted(name for name, on in wanted.items() if on)


def required_flags(features: str) -> tuple[str, ...]:
    """Give the processor flags that code for these features may need."""
    on = enabled(features)
    return tuple(sorted(flag for name, flag in INSTRUCTION_SETS.items() if name in on))


def passes(log: str) -> list[dict[str, Any]]:
    """List the passes that ran, in order, with their microseconds; empty where the compiler printed none."""
    start = log.find("[\n{")
    if start < 0:
        return []
    try:
        tree: list[dict[str, Any]] = json.JSONDecoder().raw_decode(log[start:])[0]
    except ValueError:
        return []
    found: list[dict[str, Any]] = []

    def visit(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            name, inner = str(entry.get("name", "")), [part for part in entry.get("passes", []) if part]
            if inner:
                visit(inner)
            elif name and not name.startswith(("'", "(A)")) and name not in ("root", "Rest"):
                found.append({"name": name, "us": round(entry["wall"]["duration"] * 1_000_000)})

    visit(tree)
    return found


def code_bytes(module: Path) -> int | dict[str, str]:
    """Add up the `.text` of the executables inside a compiled module: code without the weights beside it."""
    data = module.read_bytes()
    total, start = 0, data.find(ELF)
    while start >= 0:
        found = text_section_bytes(data[start:])
        if not isinstance(found, int):
            return found
        total, start = total + found, data.find(ELF, start + 1)
    return total or unknown("the module holds no executable in ELF form")
