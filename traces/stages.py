"""Which stages exist, in which order, and what does each one record?

The nine preparation stages (track A) and the ten request stages (track B) stand here once, in the specification's
order and with its words (specification, "Track A" and "Track B").
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """A stage's code: the value travels in events, the member name is the word used in code."""

    CAPTURE = "a01"
    REPRESENT = "a02"
    ANALYZE = "a03"
    OPTIMIZE = "a04"
    PARTITION = "a05"
    LOWER = "a06"
    PACKAGE = "a07"
    LOAD = "a08"
    WARM = "a09"
    BOUNDARY = "b01"
    CONTEXT = "b02"
    ROUTING = "b03"
    QUEUEING = "b04"
    PREFILL = "b05"
    DECODE = "b06"
    TOOLING = "b07"
    VALIDATION = "b08"
    COMMITMENT = "b09"
    RESPONSE = "b10"

    @property
    def word(self) -> str:
        """The stage's name in code and on screen, such as ``prefill``."""
        return self.name.lower()

    @property
    def track(self) -> str:
        """``A`` for preparation, ``B`` for requests."""
        return self.value[0].upper()

    @property
    def number(self) -> int:
        """The position inside the track, from 1."""
        return int(self.value[1:])

    @classmethod
    def named(cls, word: str) -> Stage:
        """Return the stage for a word (``prefill``) or a code (``b05``).

        Raises:
            ValueError: no stage has that word or code.
        """
        wanted = word.strip().lower()
        for stage in cls:
            if wanted in (stage.word, stage.value):
                return stage
        known = ", ".join(stage.word for stage in cls)
        raise ValueError(f"no stage is called {word!r}; the stages are: {known}")


def phase_of(stage: str | None) -> str | None:
    """Tell build-time (``build``, a01 to a07), ``readiness`` (a08, a09) and ``live`` failures apart by their stage.

    None where a failure names no stage.
    """
    if stage is None:
        return None
    found = Stage(stage)
    if found.track == "B":
        return "live"
    return "build" if found.number <= Stage.PACKAGE.number else "readiness"


@dataclass(frozen=True)
class StageDescription:
    """What the specification says about one stage."""

    stage: Stage
    title: str
    """The specification's heading."""
    emits: str
    """One sentence: what leaves the stage."""
    record: tuple[str, ...]
    """Keys of ``payload["record"]``: the specification's *Record* line (track A) or *Emits* (track B)."""


PREPARATION_STAGES: tuple[StageDescription, ...] = (
    StageDescription(
        Stage.CAPTURE,
        "Capture, export, or import",
        "A graph or program representation suitable for analysis and transformation.",
        (
            "exporter_version",
            "source_framework",
            "opset_or_dialect",
            "warnings",
            "unsupported_nodes",
            "artifact_digest",
        ),
    ),
    StageDescription(
        Stage.REPRESENT,
        "Create and verify the intermediate representation",
        "A valid high-level IR with stable identifiers and explicit data dependencies.",
        (
            "ir_version",
            "node_count",
            "parameter_count",
            "control_flow_inventory",
            "validation_result",
            "model_signature",
        ),
    ),
    StageDescription(
        Stage.ANALYZE,
        "Analyze shapes, types, layouts, and constraints",
        "Annotated graph, symbolic constraints, specialization plan, and compatibility diagnostics.",
        ("shape_profile", "guard_count", "dynamic_dimensions", "layout_decisions", "specialization_cache_key"),
    ),
    StageDescription(
        Stage.OPTIMIZE,
        "Optimize the graph and memory behavior",
        "A semantically equivalent graph with reduced work, traffic, allocation, or launch overhead.",
        (
            "pass_list",
            "graph_before",
            "graph_after",
            "numerical_validation",
            "estimated_memory_bytes",
            "optimization_us",
        ),
    ),
    StageDescription(
        Stage.PARTITION,
        "Partition and assign backends",
        "A partitioned graph with explicit backend ownership and transfer boundaries.",
        ("partition_map", "fallback_node_count", "transfer_edges", "provider_versions", "estimated_copy_bytes"),
    ),
    StageDescription(
        Stage.LOWER,
        "Lower, schedule, and generate or select code",
        "Compiled code, selected kernels, backend blobs, or runtime instructions tied to target capabilities.",
        ("target", "compiler_flags", "code_size_bytes", "tuning_record", "kernel_inventory", "build_us"),
    ),
    StageDescription(
        Stage.PACKAGE,
        "Package and serialize the deployable artifact",
        "An immutable, addressable deployment artifact with a documented compatibility envelope.",
        (
            "artifact_digest",
            "size_bytes",
            "manifest",
            "dependency_versions",
            "signature_status",
            "build_provenance",
        ),
    ),
    StageDescription(
        Stage.LOAD,
        "Load, allocate, and initialize runtime state",
        "A loaded model or engine ready for readiness checks and controlled execution.",
        (
            "load_us",
            "resident_memory_bytes",
            "device_allocation_bytes",
            "cache_capacity",
            "instance_count",
            "readiness_state",
        ),
    ),
    StageDescription(
        Stage.WARM,
        "Warm the path and establish a baseline",
        "A ready execution path with known cache state, validated output behavior, and baseline telemetry.",
        (
            "warmup_count",
            "first_run_us",
            "steady_state_us",
            "compilation_cache_events",
            "output_comparison",
            "readiness_decision",
        ),
    ),
)

REQUEST_STAGES: tuple[StageDescription, ...] = (
    StageDescription(
        Stage.BOUNDARY,
        "Request boundary and identity",
        "A versioned internal request envelope with explicit authority and service objectives.",
        ("envelope_version", "authority", "risk_class", "deadline_us", "budget", "checks"),
    ),
    StageDescription(
        Stage.CONTEXT,
        "Context assembly",
        "A bounded context package with source references, classifications, freshness, and redaction status.",
        ("sources", "classifications", "freshness", "redaction_status", "token_budget", "context_digest"),
    ),
    StageDescription(
        Stage.ROUTING,
        "Model route and admission",
        "A route decision, execution profile, priority, admission result, and fallback plan.",
        ("route", "execution_profile", "priority", "admission", "fallback_plan"),
    ),
    StageDescription(
        Stage.QUEUEING,
        "Queueing, scheduling, and batching",
        "A scheduled execution unit with batch membership, reserved resources, and queue timing.",
        ("batch_membership", "reserved_resources", "queue_us", "queue_depth"),
    ),
    StageDescription(
        Stage.PREFILL,
        "Prefill or initial model execution",
        "First-token state, model outputs, logits, embeddings, predictions, or intermediate state.",
        ("prompt_tokens", "cached_tokens", "prefill_us", "first_token_us", "logits_digest"),
    ),
    StageDescription(
        Stage.DECODE,
        "Decode, stream, or iterate",
        "Token or event stream, completed model output, usage counters, and updated execution state.",
        ("output_tokens", "finish_reason", "decode_us", "usage", "output_digest"),
    ),
    StageDescription(
        Stage.TOOLING,
        "Tool calls and structured actions",
        "Typed tool result, side-effect record, evidence, error envelope, and approval state.",
        ("tool", "authorization", "arguments_ref", "side_effect_status", "attempts", "approval_state"),
    ),
    StageDescription(
        Stage.VALIDATION,
        "Output validation and policy",
        "Accepted output, warning, policy rejection, repair request, or human-review task.",
        ("validators", "policy_version", "failed_rules", "repair_attempts", "disposition"),
    ),
    StageDescription(
        Stage.COMMITMENT,
        "Telemetry, evaluation, and memory",
        "Trace, metrics, audit records, evaluation result, cost summary, and approved memory mutations.",
        ("evaluation", "cost_microusd", "memory_mutations", "redaction_policy", "retention"),
    ),
    StageDescription(
        Stage.RESPONSE,
        "Response, continuation, or human handoff",
        "Versioned response envelope, final status, trace identifier, continuation or review reference.",
        ("response_version", "status", "warnings", "citations", "continuation_ref", "review_ref"),
    ),
)


def describe(stage: Stage) -> StageDescription:
    """Return what the specification says about a stage."""
    table = PREPARATION_STAGES if stage.track == "A" else REQUEST_STAGES
    return table[stage.number - 1]
