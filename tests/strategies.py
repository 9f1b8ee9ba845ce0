"""All generated documents and traces: what hypothesis may try."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

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
    context_multiple=positive_counts,
    batch_sizes=st.lists(positive_counts, max_size=3).map(tuple),
    engine_id=texts,
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
