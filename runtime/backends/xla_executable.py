"""How is one bucket compiled, and what is inside the executable that XLA serializes?

XLA serializes an executable as a header and a protobuf message.  Two builds of one program differ in nothing but the
order of the object files in it, which the linker does not care for: `canonicalize` sorts them, so that bytes repeat.
The bytes are read by XLA's own parser after their digest has been checked; nothing is pickled.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.export

from runtime.backends.errors import BackendRefused, BuildFailed
from runtime.backends.xla_program import PortableProgram

RESULT, OPTIONS, SYMBOLS, OBJECTS = 1, 2, 7, 8
"""Fields of the message: the compilation result and its options; in the result, kernels' names and object files."""
ELF = b"\x7fELF"
LENGTH_DELIMITED = 2
EXECUTABLE_SECTION = 4
FIXED = {1: 8, 5: 4}
FEATURES = re.compile(rb"[-+][a-z0-9._-]+(?:,[-+][a-zA-Z0-9._-]+){8,}")
CPU_NAMES = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
}
"""Instruction sets in LLVM's words and in the operating system's."""
ENTRY = re.compile(r"^ENTRY .*?^}", re.MULTILINE | re.DOTALL)
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(.*$", re.MULTILINE)
LIBRARY = re.compile(r'"kind":"__(\w+?)_fusion"')
NO_CODE = frozenset({"parameter", "constant", "tuple", "bitcast", "get-tuple-element"})


@dataclass(frozen=True)
class Compiled:
    """One compiled bucket."""

    executable: Any
    """XLA's loaded executable: takes a flat list of arrays, gives a flat list."""
    text: str
    """Optimized HLO."""
    temporary_bytes: int
    flops: str
    """As text: XLA counts in floats."""


def compile_shapes(
    program: PortableProgram, values: Mapping[str, int], held: list[Any], options: Mapping[str, Any]
) -> Compiled:
    """Compile a portable program for one value of each symbol; `held` gives shape and type of the leading arguments.

    Raises BuildFailed in XLA's own words.
    """
    read = jax.export.deserialize(bytearray(program.blob))
    try:
        lowered = jax.jit(read.call, keep_unused=True).lower(*held, *program.shapes(values))
        compiled = lowered.compile(dict(options) or None)
    except Exception as error:  # JAX raises ValueError, XLA an error class of jaxlib's
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BuildFailed(
            f"XLA refused the program: {text[:300]}",
            fix="prepare the model again, or use the onnxruntime or inductor backend",
            evidence={"operator_details": text[:1000], "exception": type(error).__name__},
            stage="a06",
        ) from error
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    costs: Mapping[str, float] = (cost if isinstance(cost, dict) else (cost or [{}])[0]) or {}
    return Compiled(
        executable=compiled.runtime_executable(),
        text=str(compiled.as_text()),
        temporary_bytes=int(memory.temp_size_in_bytes),
        flops=f"{costs.get('flops', 0):.0f}" if "flops" in costs else "unknown",
    )


def serialize(compiled: Compiled) -> bytes:
    """Give the executable's bytes, with object files in sorted order."""
    executable = compiled.executable
    return canonicalize(bytes(executable.client.serialize_executable(executable)))


def deserialize(client: Any, data: bytes) -> Any:
    """Load an executable's bytes, whose digest has been checked; BackendRefused where XLA does not take them."""
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    try:
        return client.deserialize_executable(data, xla_client.DeviceList(tuple(client.local_devices())))
    except Exception as error:  # an error class of jaxlib's
        raise BackendRefused(
            f"XLA cannot load the compiled bucket: {str(error).splitlines()[0][:300]}",
            fix="prepare the model again with this version of jaxlib",
            evidence={"provider_log": str(error)[:1000], "exception": type(error).__name__},
        ) from error


def canonicalize(data: bytes) -> bytes:
    """Sort the object files of a serialized executable; BackendRefused where the bytes are built otherwise."""
    objects = object_files(data)
    return data[: objects[0][0]] + b"".join(sorted(data[start:end] for start, end in objects)) + data[objects[-1][1] :]


def kernels(data: bytes) -> list[str]:
    """Name the kernels that XLA generated for an executable."""
    start, end = _result(data)
    found = [data[first:last] for field, _, first, last in _fields(data, start, end) if field == SYMBOLS]
    return sorted(entry[entry.index(b"\x12") + 2 :].decode("ascii") for entry in found)


def code_bytes(data: bytes) -> int:
    """Add up the machine code of an executable's object files, without headers and relocations."""
    return sum(_instruction_bytes(data[data.index(ELF, start) : end]) for start, end in object_files(data))


def instruction_sets(data: bytes) -> tuple[str, ...]:
    """Name the processor flags that the compiler was told to use, in the operating system's words."""
    match = FEATURES.search(data)
    on = {entry[1:] for entry in match.group().decode("ascii").split(",") if entry[0] == "+"} if match else set[str]()
    return tuple(name for feature, name in CPU_NAMES.items() if feature in on)


def owners(text: str, generated: list[str]) -> dict[str, dict[str, int]]:
    """Say who runs each instruction of optimized HLO: code that XLA generated, or a library that it calls.

    Libraries are YNNPACK (fusions marked `__ynn_fusion`) and Eigen (products without a kernel of their own).
    """
    entry = ENTRY.search(text)
    found: dict[str, Counter[str]] = {}
    own = {name.removesuffix("_kernel") for name in generated}
    for match in INSTRUCTION.finditer(entry.group() if entry else ""):
        name, operation = match.group(1), match.group(2)
        if operation in NO_CODE:
            continue
        library = LIBRARY.search(match.group())
        owner = library.group(1) if library else "eigen" if operation == "dot" and name not in own else "generated"
        found.setdefault(owner, Counter())[operation] += 1
    return {owner: dict(sorted(counts.items())) for owner, counts in sorted(found.items())}


def count_instructions(text: str) -> int:
    """Count the instructions of a module in HLO text, nested computations included."""
    return len(INSTRUCTION.findall(text))


def _instruction_bytes(shared: bytes) -> int:
    """Add up the sections of a 64-bit little-endian ELF file that hold instructions."""
    if shared[:6] != ELF + b"\x02\x01":
        raise _foreign("an object file that is not 64-bit little-endian ELF")
    (table,) = struct.unpack_from("<Q", shared, 0x28)
    size, count = struct.unpack_from("<HH", shared, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", shared, table + index * size) for index in range(count)]
    return sum(int(section[5]) for section in sections if section[2] & EXECUTABLE_SECTION)


def object_files(data: bytes) -> list[tuple[int, int]]:
    """Find where each object file of a serialized executable begins and ends, as fields of the message."""
    start, end = _result(data)
    found = [(begin, last) for field, begin, _, last in _fields(data, start, end) if field == OBJECTS]
    adjacent = all(before[1] == after[0] for before, after in pairwise(found))
    if not found or not adjacent or any(ELF not in data[first:last][:16] for first, last in found):
        raise _foreign("no row of object files")
    return found


def _result(data: bytes) -> tuple[int, int]:
    try:
        length, start = _varint(data, 0)
        found = {field: (first, last) for field, _, first, last in _fields(data, start + length, len(data))}
    except (IndexError, ValueError) as error:
        raise _foreign("no whole message") from error
    if set(found) != {RESULT, OPTIONS}:
        raise _foreign("no compilation result with its options")
    return found[RESULT]


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Walk a protobuf message: field number, where it begins, where its content begins, where it ends."""
    position = start
    while position < end:
        begin = position
        key, position = _varint(data, position)
        kind = key & 7
        if kind == LENGTH_DELIMITED:
            length, content = _varint(data, position)
            position = content + length
        elif kind in FIXED:
            content, position = position, position + FIXED[kind]
        elif kind == 0:
            content = position
            _, position = _varint(data, position)
        else:
            raise ValueError(f"wire type {kind}")
        if position > end:
            raise ValueError("a field reaches beyond its message")
        yield key >> 3, begin, content, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def _foreign(reason: str) -> BackendRefused:
    return BackendRefused(
        f"the serialized executable is not built as this version of jaxlib builds it: {reason}",
        fix="use jaxlib 0.10, or specialization=lazy, which ships no executables",
        evidence={"validation_output": reason},
    )
