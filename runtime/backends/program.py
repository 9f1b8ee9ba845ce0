"""What is the exported program, and what does it say of itself?  One `torch.export` program for every backend."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from manifests.canonical import digest
from runtime.backends.contract import Bounds
from runtime.backends.errors import BackendRefused, BuildFailed, InputRefused
from runtime.backends.protocol import BuildOptions
from runtime.backends.side_effects import check_side_effects
from runtime.backends.step_form import EXAMPLE, MakeForm, StepForm, gathered_form
from runtime.backends.torch_executor import hold_threads
from runtime.models.decoder import Decoder, NormKind
from runtime.models.loader import Checkpoint, StepKind, build_decoder, load_checkpoint

SMALLEST_CONTEXT = 20
"""The fixture session needs that many positions."""


@dataclass(frozen=True, kw_only=True)
class CapturedProgram:
    """An exported program with all that a backend needs to know of it, wherever it came from."""

    framework: str
    """Family of a checkpoint, or torch-export."""
    model_digest: str
    """Of the model as it was found."""
    exported: ExportedProgram
    serialized: bytes
    """What `torch.export.save` wrote; byte-stable over processes for a program of our own capture."""
    inputs: tuple[Tensor, ...]
    """Example inputs, flat and in order; their values do not matter."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    names: Mapping[str, str]
    """The exporter's text of a dynamic dimension, such as `s31`, and the name under which it is recorded."""
    declared: Mapping[str, list[int | None]]
    """Inclusive range of each named symbol, None for no upper end; every later stage must keep it."""
    free: str | None = None
    """What symbols are called that are not declared; None where all are."""
    unchecked: frozenset[str] = frozenset()
    """Inputs whose dimensions the runtime itself lays out, so that no stage need conserve them."""
    warnings: tuple[str, ...] = ()
    trace_us: int = 0

    @property
    def digest(self) -> str:
        """Name the program by its serialized bytes."""
        return digest(self.serialized)


@dataclass(frozen=True, kw_only=True)
class StepProgram(CapturedProgram):
    """A checkpoint as decoder module and as exported program."""

    checkpoint: Checkpoint
    decoder: Decoder
    layout: Mapping[str, str]
    """How keys and values lie in memory."""


def check_bounds(bounds: Bounds) -> None:
    """Refuse bounds that the example or the fixture session would not fit into, saying which of them needs how much."""
    batch, tokens, *_ = EXAMPLE
    above = "the program is traced with {}, and an exporter fixes a size that reaches its bound"
    needs = {
        "B": ("max_batch", batch + 1, above.format(f"{batch} rows")),
        "T": ("max_tokens", tokens + 1, above.format(f"{tokens} new tokens a row")),
        "S": ("max_context", SMALLEST_CONTEXT, f"the fixture session is {SMALLEST_CONTEXT} positions long"),
    }
    for symbol, (name, least, reason) in needs.items():
        most = bounds.symbols()[symbol][1]
        if most < least:
            raise BackendRefused(
                f"{name} {most} (the bound of {symbol}) is too small: {reason}",
                fix=f"declare at least {least}: --max-{name.removeprefix('max_')} {least}",
                evidence={"validation_output": f"{symbol} <= {most}, at least {least}"},
                stage="a01",
            )


@contextmanager
def quiet_exporters() -> Generator[list[str]]:
    """Collect Python warnings as text and hold back the exporters' log lines about absent optional libraries."""
    collected: list[str] = []
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield collected
        texts = {f"{item.category.__name__}: {str(item.message).splitlines()[0][:200]}" for item in caught}
        collected.extend(sorted(texts))
    finally:
        logger.setLevel(before)


def capture_program(
    model_folder: Path,
    options: BuildOptions,
    *,
    tile: int | None = None,
    kind: StepKind = "plain",
    make_form: MakeForm = gathered_form,
) -> StepProgram:
    """Load a checkpoint, export its functional step, and check that capturing lost no behaviour.

    tile: of queries, for the step whose rows' bits are their own; None for the plain one.
    kind, make_form: the decoder's and its program's form; they go together.

    Errors: `ModelRefused` from the loader; `BuildFailed` where export fails; `BackendRefused` where the module has a
    hidden side effect or the program computes something else than the module.
    """
    check_bounds(options.bounds)
    hold_threads(options.threads)
    checkpoint = load_checkpoint(model_folder)
    norm = cast(NormKind, options.norm)
    decoder = build_decoder(checkpoint, options.precision, norm=norm, tile=tile, kind=kind)
    form = make_form(checkpoint.config, options.precision, options.program_bounds)
    start = time.perf_counter_ns()
    try:
        with torch.no_grad(), quiet_exporters() as noted:
            exported = torch.export.export(decoder, form.example, dynamic_shapes=form.dynamic_shapes)
            forget_places(exported)
            held = io.BytesIO()
            torch.export.save(exported, held)
    except Exception as error:  # torch.export has no common error class
        raise BuildFailed(
            f"torch.export refused the model: {first_line(error)}",
            fix="the message names the operator or the dimension that cannot be captured",
            evidence={"operator_details": first_line(error), "exception": type(error).__name__},
            stage="a01",
        ) from error
    spent = (time.perf_counter_ns() - start) // 1000
    check_capture(decoder, exported, form)
    return StepProgram(
        framework=checkpoint.config.family,
        model_digest=checkpoint.digest,
        exported=exported,
        serialized=held.getvalue(),
        inputs=form.example,
        input_names=form.inputs,
        output_names=form.outputs,
        names=_step_names(exported, form),
        declared={name: list(found) for name, found in form.bounds.symbols().items()},
        free=form.free,
        unchecked=form.unchecked,
        warnings=tuple(noted),
        trace_us=spent,
        checkpoint=checkpoint,
        decoder=decoder,
        layout=form.layout,
    )


def forget_places(exported: ExportedProgram) -> None:
    """Drop from every node where in the source it came from: a checkout's path and line numbers are no identity.

    They would be saved with the program, and go on into ONNX metadata and generated code: the same model prepared by
    a copy of this code in another folder would have another digest at every stage.
    """
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def check_capture(decoder: torch.nn.Module, exported: ExportedProgram, form: StepForm) -> None:
    """Run module, module and program: state or randomness of the module's own shows in the module or in the answers."""
    first = check_side_effects(decoder, form.example)
    with torch.no_grad():
        again = decoder(*form.example)
        captured = exported.module()(*form.example)
    for index, name in enumerate(form.outputs):
        if not torch.equal(first[index], again[index]):
            raise BackendRefused(
                f"the model answers {name} differently each time: it has state or randomness that capture would drop",
                fix="make forward a pure function of its inputs",
                evidence={"operator_details": "hidden side effect", "output": name},
                stage="a01",
            )
        if not torch.allclose(first[index].float(), captured[index].float(), rtol=0.0, atol=1e-3):
            raise BackendRefused(
                f"the captured program computes another {name} than the model",
                fix="look for Python state read during forward",
                evidence={"operator_details": "captured program differs", "output": name},
                stage="a01",
            )


def histogram(exported: ExportedProgram) -> dict[str, int]:
    """Count the program's operators by name."""
    nodes = exported.graph.nodes
    return dict(sorted(Counter(str(node.target) for node in nodes if node.op == "call_function").items()))


def control_flow(exported: ExportedProgram) -> list[str]:
    """Name higher-order operators (branches, loops) and nested graphs."""
    higher = [
        str(node.target)
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.HigherOrderOperator)  # pyright: ignore[reportPrivateUsage]
    ]
    return sorted({*higher, *(name for name, _ in exported.graph_module.named_children())})


def _step_names(exported: ExportedProgram, form: StepForm) -> dict[str, str]:
    """Name the dimensions of the functional step, by where they stand."""
    found = placeholders(exported, form.inputs)
    return {str(found[name].shape[axis]): symbol for symbol, (name, axis) in form.places.items()}


def signature(program: CapturedProgram) -> dict[str, dict[str, Any]]:
    """Describe every user input: dtype, symbolic shape with the recorded names, and whether it is contiguous."""
    return {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": shape_text(value, program.names),
            "contiguous": bool(value.is_contiguous()),
        }
        for name, value in placeholders(program.exported, program.input_names).items()
    }


def shape_text(value: Tensor, names: Mapping[str, str]) -> list[str]:
    """Write a symbolic shape with the recorded names."""
    return [names.get(str(size), str(size)) for size in value.shape]


def ranges(program: CapturedProgram) -> dict[str, list[int | None]]:
    """Read back the range of each declared symbol from the program's own constraints."""
    return {
        program.names[str(symbol)]: range_of(interval)
        for symbol, interval in program.exported.range_constraints.items()
        if program.names.get(str(symbol)) in program.declared
    }


def range_of(interval: Any) -> list[int | None]:
    """Read an interval of the exporter; None stands for no upper end."""
    upper = interval.upper
    return [int(interval.lower), None if str(upper) in ("int_oo", "oo") else int(upper)]


def check_conserved(
    found: Mapping[str, Sequence[int | None]],
    declared: Mapping[str, Sequence[int | None]],
    *,
    stage: str,
    where: str,
) -> None:
    """Refuse a program whose dynamic dimensions or bounds are not the declared ones: a silent specialization."""
    if {name: list(kept) for name, kept in found.items()} != {name: list(kept) for name, kept in declared.items()}:
        raise InputRefused(
            f"{where} holds the dimensions {found}, declared were {declared}: a stage specialized the program silently",
            fix="declare the bounds that the backend keeps, or choose another backend",
            evidence={"input_signature": str(found), "guard": str(declared), "compile_event": where},
            stage=stage,
        )


def placeholders(exported: ExportedProgram, names: Sequence[str]) -> dict[str, Tensor]:
    """Find the symbolic tensors of user inputs, in the order of `names`."""
    wanted = set(names)
    found = {
        node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in wanted
    }
    return {name: found[name] for name in names}


def first_line(error: BaseException) -> str:
    """Give an error's first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__
