"""How does a `.pt2` that somebody saved become a captured program?  Nothing in it may run code or hide state.

`torch.export.load` unpickles example inputs, with a fallback to arbitrary objects, loads compiled libraries that an
archive carries, and accepts programs that change their own buffers.  Examples are dropped, the rest is refused by name,
both before torch sees the archive.
"""

from __future__ import annotations

import io
import json
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from manifests.canonical import digest
from runtime.backends.errors import BackendRefused, BuildFailed
from runtime.backends.index_ranges import index_ranges
from runtime.backends.one_shot import fixture_inputs, typical_sizes
from runtime.backends.program import (
    CapturedProgram,
    first_line,
    placeholders,
    quiet_exporters,
    range_of,
    shape_text,
)
from runtime.backends.protocol import BuildOptions
from runtime.backends.tensor_contract import DTYPES, TensorContract, TensorRule, bounded
from runtime.models.config import ModelRefused

ALLOWED = re.compile(
    r"^(archive_format|archive_version|byteorder|\.data/[\w.]+|models/\w+\.json|extra/.*"
    r"|data/sample_inputs/\w+\.pt|data/weights/(weight_\d+|\w+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|\w+_constants_config\.json))$"
)
"""Members of an archive of plain tensors and one graph; custom objects, pickles and compiled code have other names."""


@dataclass(frozen=True, kw_only=True)
class SavedProgram(CapturedProgram):
    """A one-shot program with the contract that was read from it."""

    contract: TensorContract
    precision: str


def plain_archive(data: bytes, name: str) -> bytes:
    """Rewrite an archive of one graph and plain tensors without the pickled examples; refuse one that holds more.

    Members are stored in order, so that equal programs give equal bytes.  Errors: `ModelRefused`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {entry: archive.read(entry) for entry in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _refused(name, f"is not a program archive: {error}") from error
    _check_members({entry.partition("/")[2]: content for entry, content in members.items()}, name)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:
        for entry in sorted(members):
            content = b"" if "/data/sample_inputs/" in entry else members[entry]
            archive.writestr(zipfile.ZipInfo(entry, date_time=(1980, 1, 1, 0, 0, 0)), content)
    return written.getvalue()


def _check_members(members: dict[str, bytes], name: str) -> None:
    strange = sorted(entry for entry in members if not ALLOWED.match(entry))
    if strange:
        raise _refused(name, f"holds {strange[0]!r}, which is neither graph nor plain tensor")
    if members.get("archive_format") != b"pt2" or sum(entry.startswith("models/") for entry in members) != 1:
        raise _refused(name, "is not an archive of one exported program")
    for entry, content in members.items():
        if entry.endswith("_config.json"):
            try:
                pickled = [key for key, meta in json.loads(content)["config"].items() if meta["use_pickle"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _refused(name, f"has an unreadable {entry}") from error
            if pickled:
                raise _refused(name, f"holds the pickled object {pickled[0]!r}")


def load_program(data: bytes, name: str) -> ExportedProgram:
    """Read a program from what `plain_archive` gave.  Errors: `ModelRefused`."""
    try:
        with quiet_exporters():
            return torch.export.load(io.BytesIO(data))
    except Exception as error:  # torch.export has no common error class
        raise _refused(name, f"cannot be read: {first_line(error)}") from error


def capture_saved(path: Path, options: BuildOptions) -> SavedProgram:
    """Load a saved program and read names, ranges and contract from it.

    Errors: `ModelRefused`; `BackendRefused` for state, randomness, inputs that are no tensors, or another precision
    than the program's own.
    """
    start = time.perf_counter_ns()
    data = path.read_bytes()
    plain = plain_archive(data, path.name)
    exported = load_program(plain, path.name)
    _check_pure(exported)
    inputs, outputs = exported.graph_signature.user_inputs, output_names(exported)
    symbolic = tensors_of(exported)
    precision = precision_of(exported)
    if options.precision != precision:
        raise BackendRefused(
            f"the program computes in {precision}, asked for was {options.precision}",
            fix=f"use --precision {precision}; a saved program keeps the precision that it was exported in",
            evidence={"operator_details": precision, "validation_output": options.precision},
            stage="a01",
        )
    contract = contract_of(exported, outputs, options)
    declared = {
        str(symbol): range_of(found)
        for symbol, found in exported.range_constraints.items()
        if str(symbol) in contract.symbols
    }
    program = SavedProgram(
        framework="torch-export",
        model_digest=digest(data),
        exported=exported,
        serialized=plain,
        inputs=example_tensors(contract),
        input_names=tuple(str(entry) for entry in inputs),
        output_names=outputs,
        names={str(symbol): str(symbol) for symbol in exported.range_constraints},
        declared=declared,
        contract=contract,
        precision=precision,
        trace_us=(time.perf_counter_ns() - start) // 1000,
    )
    _check_repeats(program, symbolic)
    return program


def contract_of(exported: ExportedProgram, outputs: tuple[str, ...], options: BuildOptions) -> TensorContract:
    """Derive the contract: shapes and dtypes from the signature, ranges from constraints, indices from the graph."""
    found = index_ranges(exported)
    inputs = tuple(
        TensorRule(
            name=name, dtype=_dtype(name, value), shape=tuple(shape_text(value, {})), index_range=found.get(name)
        )
        for name, value in tensors_of(exported).items()
    )
    values = [node.meta["val"] for node in exported.graph.output_node().args[0] if hasattr(node, "meta")]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    rules = tuple(_rule(name, value, None) for name, value in zip(outputs, values, strict=True))
    ranges = {str(symbol): tuple(range_of(entry)) for symbol, entry in exported.range_constraints.items()}
    return TensorContract(inputs=inputs, outputs=rules, symbols=bounded(inputs, ranges, options.bounds))  # pyright: ignore[reportArgumentType]


def tensors_of(exported: ExportedProgram) -> dict[str, Tensor]:
    """Find the symbolic tensors of all user inputs; an input that is no tensor is refused."""
    names = exported.graph_signature.user_inputs
    plain = [str(name) for name in names if isinstance(name, str)]
    found = {
        node.name: node.meta.get("val")
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in plain
    }
    wrong = [str(name) for name in names if not isinstance(found.get(str(name)), Tensor)]
    if wrong:
        raise BackendRefused(
            f"input {wrong[0]!r} of the program is no tensor",
            fix="export the program with tensors as its only inputs",
            evidence={"operator_details": ", ".join(wrong)},
            stage="a01",
        )
    return placeholders(exported, plain)


def output_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Name the outputs by their key or place in what the program returns; a single tensor is `output`."""
    spec = _known(exported.call_spec.out_spec)
    count = spec.num_leaves
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
    names = [re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") for path, _ in paths]
    named = tuple(f"output_{name}" if name.isdigit() else name or "output" for name in names)
    tensors = [node for node in exported.graph_signature.user_outputs if isinstance(node, str)]
    if len(set(named)) != count or len(tensors) != count or not count:
        raise BackendRefused(
            f"the program returns {count} values of which {len(tensors)} are tensors with {len(set(named))} names",
            fix="export a program that returns tensors only, under names of their own",
            evidence={"operator_details": ", ".join(named)},
            stage="a01",
        )
    return named


def precision_of(exported: ExportedProgram) -> str:
    """Name the precision of the weights; a program without floating weights counts as float32."""
    kinds = {tensor.dtype for tensor in exported.state_dict.values() if tensor.is_floating_point()}
    return "bfloat16" if torch.bfloat16 in kinds else "float32"


FlatCall = Callable[[list[Tensor]], list[Tensor]]
"""A program as a function of flat tensors."""


def call_program(exported: ExportedProgram) -> FlatCall:
    """Make a function from flat tensors to flat tensors; it checks the program's own guards."""
    module, spec = exported.module(check_guards=True), _known(exported.call_spec.in_spec)

    def call(tensors: list[Tensor]) -> list[Tensor]:
        arguments, keywords = pytree.tree_unflatten(tensors, spec)
        return pytree.tree_leaves(module(*arguments, **keywords))

    return call


def example_tensors(contract: TensorContract) -> tuple[Tensor, ...]:
    """Make inputs that satisfy the contract; those that an archive carries are pickled and are never read."""
    made = fixture_inputs(contract, typical_sizes(contract), label="example")
    return tuple(torch.from_numpy(made[rule.name]) for rule in contract.inputs)


def _check_pure(exported: ExportedProgram) -> None:
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values(), *written(exported)]
    if changed:
        raise BackendRefused(
            f"the program changes {changed[0]!r} when it runs: its answers depend on what ran before",
            fix="export the module in eval mode, and return new state instead of keeping it",
            evidence={"operator_details": "hidden side effect", "output": ", ".join(changed)},
            stage="a01",
        )


def written(exported: ExportedProgram) -> list[str]:
    """Name the buffers and inputs that an operator of the graph writes into; training IR does not list them itself."""
    named = {**exported.graph_signature.inputs_to_buffers, **exported.graph_signature.inputs_to_parameters}
    found: list[str] = []
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, given in zip(schema.arguments if schema else (), node.args, strict=False):
            into = argument.alias_info is not None and argument.alias_info.is_write
            if into and getattr(given, "op", None) == "placeholder":
                found.append(str(named.get(given.name, given.name)))
    return found


def _check_repeats(program: SavedProgram, symbolic: dict[str, Tensor]) -> None:
    """Run the program twice: randomness of its own would make every replay differ."""
    call = call_program(program.exported)
    try:
        with torch.inference_mode():
            first, again = call(list(program.inputs)), call(list(program.inputs))
    except Exception as error:  # a program's operators raise what they like
        raise BuildFailed(
            f"the program does not run on its own example: {first_line(error)}",
            fix="export it again with example inputs that it accepts",
            evidence={"operator_details": first_line(error), "input_signature": ", ".join(symbolic)},
            stage="a01",
        ) from error
    for name, one, two in zip(program.output_names, first, again, strict=True):
        if not torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True):
            raise BackendRefused(
                f"the program answers {name} differently each time: it has state or randomness of its own",
                fix="export the module in eval mode",
                evidence={"operator_details": "hidden randomness", "output": name},
                stage="a01",
            )


def _known(spec: pytree.TreeSpec | None) -> pytree.TreeSpec:
    if spec is None:
        raise BackendRefused(
            "the program does not say how its inputs and outputs are nested", fix="export it again", stage="a01"
        )
    return spec


def _rule(name: str, value: Tensor, index_range: tuple[int, int] | None) -> TensorRule:
    shape = tuple(shape_text(value, {}))
    return TensorRule(name=name, dtype=_dtype(name, value), shape=shape, index_range=index_range)


def _dtype(name: str, value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise BackendRefused(
            f"{name} is {kind}, which cannot cross the runtime's boundary",
            fix=f"convert inside the program; tensors outside may be {', '.join(DTYPES)}",
            evidence={"operator_details": f"{name}: {kind}"},
            stage="a01",
        )
    return kind


def _refused(name: str, what: str) -> ModelRefused:
    return ModelRefused(
        f"{name} {what}",
        fix="save the program again with torch.export.save, from a module of plain tensors",
        evidence={"artifact_digest": name, "validation_output": what},
    )
