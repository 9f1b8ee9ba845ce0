"""All generated documents and traces: what hypothesis may try."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from eval.records import (
    DecisionRecord,
    FailureRecord,
    GenerationRecord,
    RequestRecord,
    SpanRecord,
    StageRecord,
    TokenRecord,
    ToolCallRecord,
)
from manifests.artifact import ArtifactManifest
from manifests.base import Manifest
from manifests.canonical import LARGEST_INTEGER
from manifests.compiler import CompilerManifest
from manifests.context import ContextManifest
from manifests.generation import GenerationManifest
from manifests.hardware import HardwareManifest
from manifests.policy import PolicyManifest
from manifests.run import Pins
from manifests.scheduling import SchedulingManifest
from manifests.tools import ToolsManifest

ascii_keys = st.text(st.characters(max_codepoint=127), max_size=8)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
safe_integers = st.integers(-LARGEST_INTEGER, LARGEST_INTEGER)
counts = st.integers(0, LARGEST_INTEGER)
positive_counts = st.integers(1, LARGEST_INTEGER)
digests = st.binary(min_size=32, max_size=32).map(lambda data: "sha256:" + data.hex())
decimals = st.decimals(min_value=-1000, max_value=1000, places=3, allow_nan=False).map(str)

scalars = st.none() | st.booleans() | safe_integers | texts
documents: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ascii_keys, inner, max_size=4),
    max_leaves=20,
)
"""Anything that canonical JSON allows."""

text_maps = st.dictionaries(names, texts, max_size=3)
digest_maps = st.dictionaries(names, digests, max_size=3)
text_tuples = st.lists(texts, max_size=3).map(tuple)

artifacts = st.builds(
    ArtifactManifest,
    model=texts,
    family=texts,
    model_digest=digests,
    tokenizer_digest=st.none() | digests,
    preprocessing_digest=st.none() | digests,
    adapter_digests=st.lists(digests, max_size=2).map(tuple),
    quantization=texts,
    package_digest=st.none() | digests,
)
compilers = st.builds(
    CompilerManifest,
    backend=texts,
    backend_version=texts,
    precision=texts,
    exporter=texts,
    exporter_version=texts,
    optimization_level=texts,
    passes=text_tuples,
    flags=text_maps,
    execution_providers=text_tuples,
    batch_invariant=st.booleans(),
    runtime_versions=text_maps,
)
hardware = st.builds(
    HardwareManifest,
    cpu_model=texts,
    architecture=texts,
    isa_flags=text_tuples,
    cores=positive_counts,
    threads=positive_counts,
    memory_bytes=counts,
    kernel=texts,
    topology=texts,
    firmware=st.none() | texts,
    environment=text_maps,
    library_versions=text_maps,
    gpu=st.none() | texts,
    gpu_driver=st.none() | texts,
)
schedulings = st.builds(
    SchedulingManifest,
    policy=st.sampled_from(["fcfs", "priority", "deadline", "fair"]),
    max_num_seqs=positive_counts,
    max_num_batched_tokens=positive_counts,
    long_prefill_token_threshold=counts,
    block_size=positive_counts,
    num_blocks=positive_counts,
    watermark=decimals,
    enable_prefix_caching=st.booleans(),
    context_multiple=st.none() | positive_counts,
    batch_sizes=st.lists(positive_counts, max_size=3).map(tuple),
    engine_id=texts,
    max_num_queued_reqs=st.none() | positive_counts,
    max_num_queued_tokens=st.none() | positive_counts,
    max_preemptions=st.none() | counts,
    aging_steps=st.just(1_000) | positive_counts,
    aging_us=st.just(60_000_000) | positive_counts,
    load_shedding=st.booleans(),
    prefix_sharing=st.sampled_from(["tenant", "all"]),
    max_undelivered_tokens=st.none() | positive_counts,
    row_order=st.sampled_from(["stable", "service"]),
)
generations = st.builds(
    GenerationManifest,
    seed=counts,
    sampler=texts,
    sampler_algorithm=texts,
    temperature=decimals,
    top_k=st.none() | positive_counts,
    top_p=decimals,
    max_tokens=positive_counts,
    stop=text_tuples,
    stop_token_ids=st.lists(counts, max_size=3).map(tuple),
    grammar_digest=st.none() | digests,
)
contexts = st.builds(
    ContextManifest,
    query_transform=texts,
    index_digest=st.none() | digests,
    filters=text_maps,
    ranking=texts,
    source_snapshots=digest_maps,
    redaction_version=texts,
    context_digest=st.none() | digests,
    token_budget=counts,
)
tools = st.builds(
    ToolsManifest,
    server=texts,
    server_version=texts,
    protocol_version=texts,
    tools=digest_maps,
    authorization_version=texts,
    resource_versions=text_maps,
)
policies = st.builds(
    PolicyManifest,
    policy_version=texts,
    validators=text_maps,
    output_schema_digest=st.none() | digests,
    evaluation=text_maps,
    thresholds=st.dictionaries(names, decimals, max_size=3),
    repair_limit=counts,
)
_dimensions = (artifacts, compilers, hardware, schedulings, generations, contexts, tools, policies)
manifests: st.SearchStrategy[Manifest] = st.one_of(*_dimensions)
manifest_pairs: st.SearchStrategy[tuple[Manifest, Manifest]] = st.one_of(*(st.tuples(one, one) for one in _dimensions))
"""Two documents of one kind."""
pins = st.builds(
    Pins,
    artifact=artifacts,
    compiler=compilers,
    hardware=hardware,
    scheduling=schedulings,
    generation=generations,
    context=contexts,
    tools=tools,
    policy=policies,
)

short_digests = st.sampled_from([f"sha256:{number:064x}" for number in range(3)])
"""Few, so that two records often agree."""
numbers = st.floats(-8, 8, allow_nan=False)
token_records = st.builds(
    TokenRecord,
    token=st.integers(0, 3),
    logits_digest=short_digests,
    logprob=numbers,
    margin=numbers,
    step=st.integers(0, 50),
    schedule_digest=st.none() | short_digests,
)
generation_records = st.builds(
    GenerationRecord,
    prompt_digest=short_digests,
    tokens=st.lists(token_records, max_size=6).map(tuple),
    finish_reason=st.sampled_from(["stop", "length", "deadline"]),
    schedule_digest=st.none() | short_digests,
)
stage_records = st.builds(
    StageRecord,
    stage=st.sampled_from([f"b{number:02d}" for number in range(1, 11)]),
    status=st.sampled_from(["ok", "error", None]),
    input_digest=short_digests,
    output_digest=short_digests,
    decision=st.sampled_from([None, "allow", "deny"]),
    attempt=st.integers(1, 2),
)
tool_call_records = st.builds(
    ToolCallRecord,
    name=st.sampled_from(["lookup", "create"]),
    arguments_digest=short_digests,
    result_digest=short_digests,
    decision=st.sampled_from(["allow", "deny"]),
)
failure_records = st.builds(
    FailureRecord,
    failure_class=st.sampled_from(["capacity_admission", "timeout_cancellation"]),
    stage=st.sampled_from(["b03", "b06"]),
    retry_decision=st.sampled_from(["none", "retry"]),
)
request_records = st.builds(
    RequestRecord,
    request_ref=st.sampled_from(["req_1", "req_2"]),
    stages=st.lists(stage_records, max_size=8).map(tuple),
    generations=st.lists(generation_records, max_size=2).map(tuple),
    tool_calls=st.lists(tool_call_records, max_size=2).map(tuple),
    policy_decisions=st.lists(
        st.builds(DecisionRecord, name=st.just("cited"), decision=st.sampled_from(["pass", "fail"])), max_size=2
    ).map(tuple),
    failure=st.none() | failure_records,
    terminal_status=st.sampled_from(["ok", "error"]),
    response_digest=st.none() | short_digests,
)
"""Any request that could have been recorded, sensible or not."""


@st.composite
def span_sets(draw: st.DrawFn, *, latest_us: int = 400) -> tuple[SpanRecord, ...]:
    """Spans that overlap, nest, touch, leave gaps and last no time at all; some name a parent."""
    bounds = st.tuples(st.integers(0, latest_us), st.integers(0, latest_us)).map(sorted)
    spans: list[SpanRecord] = []
    for number in range(draw(st.integers(1, 10))):
        start, end = draw(bounds)
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        spans.append(SpanRecord(f"s{number}", start, end, None, str(number), None if parent is None else str(parent)))
    return tuple(spans)
