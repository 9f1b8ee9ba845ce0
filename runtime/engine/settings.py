"""What do the scheduling pins mean for this package?  The manifest as numbers, within the bounds that were prepared."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from manifests.scheduling import Policy, SchedulingManifest
from runtime.backends.contract import InputContract
from runtime.backends.protocol import Executor
from runtime.engine.errors import SettingsRefused

MAX_PREEMPTIONS = 4
"""Where the manifest names none, under every policy but `fcfs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The scheduling manifest as numbers, with the limits of the package that runs."""

    max_num_seqs: int
    max_num_batched_tokens: int
    longest_chunk: int
    """Largest number of one sequence's tokens in a step."""
    block_size: int
    num_blocks: int
    watermark_blocks: int
    enable_prefix_caching: bool
    context_multiple: int
    batch_sizes: tuple[int, ...]
    longest_sequence: int
    """Prompt and output tokens together."""
    policy: Policy
    max_num_queued_reqs: int | None
    max_num_queued_tokens: int | None
    max_preemptions: int | None
    """None is no limit."""
    aging_steps: int
    aging_us: int
    load_shedding: bool
    share_prefixes: bool
    """Whether tenants may read each other's cached prefixes."""
    max_undelivered_tokens: int | None
    stable_rows: bool
    """Whether a decoding sequence keeps its row from step to step."""

    @classmethod
    def of(
        cls, manifest: SchedulingManifest, *, max_positions: int, max_batch: int, max_tokens: int, max_context: int
    ) -> Settings:
        """Read a manifest under a package's bounds; raises SettingsRefused where they contradict each other."""
        _check(manifest, max_batch=max_batch)
        block = manifest.block_size
        multiple = manifest.context_multiple or block
        chunk = min(manifest.max_num_batched_tokens, max_tokens // block * block)
        if manifest.long_prefill_token_threshold:
            chunk = min(chunk, manifest.long_prefill_token_threshold)
        if chunk < 1 or max_context < multiple:
            raise SettingsRefused("the package's bounds are below one block", fix="prepare it with larger bounds")
        return cls(
            max_num_seqs=manifest.max_num_seqs,
            max_num_batched_tokens=manifest.max_num_batched_tokens,
            longest_chunk=chunk,
            block_size=block,
            num_blocks=manifest.num_blocks,
            watermark_blocks=int(Decimal(manifest.watermark) * manifest.num_blocks),
            enable_prefix_caching=manifest.enable_prefix_caching,
            context_multiple=multiple,
            batch_sizes=tuple(sorted(manifest.batch_sizes)),
            longest_sequence=min(max_positions, max_context // multiple * multiple, manifest.num_blocks * block),
            policy=manifest.policy,
            max_num_queued_reqs=manifest.max_num_queued_reqs,
            max_num_queued_tokens=manifest.max_num_queued_tokens,
            max_preemptions=_preemption_limit(manifest),
            aging_steps=manifest.aging_steps,
            aging_us=manifest.aging_us,
            load_shedding=manifest.load_shedding,
            share_prefixes=manifest.prefix_sharing == "all",
            max_undelivered_tokens=manifest.max_undelivered_tokens,
            stable_rows=manifest.row_order == "stable",
        )

    def pad_batch(self, rows: int) -> int:
        """Return the smallest declared batch size that holds `rows`."""
        return next(size for size in self.batch_sizes if size >= rows)

    def pad_tokens(self, count: int) -> int:
        """Return the padded tokens of a chunk: 1, or a multiple of the block size."""
        return 1 if count == 1 else -(-count // self.block_size) * self.block_size

    def pad_context(self, start: int) -> int:
        """Return the padded number of earlier positions; at least one multiple."""
        return max(1, -(-start // self.context_multiple)) * self.context_multiple


def settings_for(scheduling: SchedulingManifest, executor: Executor) -> Settings:
    """Read a scheduling manifest under the bounds of the package that runs; raises SettingsRefused."""
    return settings_within(scheduling, executor.contract)


def settings_within(scheduling: SchedulingManifest, contract: InputContract) -> Settings:
    """Read a scheduling manifest under a package's contract, which needs no loaded model; raises SettingsRefused."""
    return Settings.of(
        scheduling,
        max_positions=contract.max_positions,
        max_batch=contract.bounds.max_batch,
        max_tokens=contract.bounds.max_tokens,
        max_context=contract.bounds.max_context,
    )


def pool_slots(settings: Settings) -> int:
    """Slots of one layer's pool: the usable blocks and the scratch block."""
    return (settings.num_blocks + 1) * settings.block_size


def _preemption_limit(manifest: SchedulingManifest) -> int | None:
    if manifest.max_preemptions is not None or manifest.policy == "fcfs":
        return manifest.max_preemptions
    return MAX_PREEMPTIONS


def _check(manifest: SchedulingManifest, *, max_batch: int) -> None:
    """Refuse pins that no engine could honour together, or not with packages of so many rows."""
    multiple, block, most = manifest.context_multiple, manifest.block_size, manifest.max_num_seqs
    largest = max(manifest.batch_sizes, default=0)
    if multiple is not None and multiple % block:
        message = f"context_multiple {multiple} is no multiple of block_size {block}"
        raise SettingsRefused(message, fix=f"set context_multiple to {-(-multiple // block) * block}, or block_size")
    if manifest.max_num_batched_tokens < most:
        message = f"max_num_batched_tokens {manifest.max_num_batched_tokens} is below max_num_seqs {most}"
        raise SettingsRefused(f"{message}: decoding would starve", fix="raise scheduling.max_num_batched_tokens")
    if not most <= largest <= max_batch:
        sizes = ",".join(map(str, manifest.batch_sizes)) or "(none)"
        message = f"the largest of batch_sizes {sizes} must cover max_num_seqs {most}"
        raise SettingsRefused(
            f"{message} and stay within the package's {max_batch} rows",
            fix="adjust scheduling.batch_sizes and scheduling.max_num_seqs, or prepare with a larger --max-batch",
        )
    if not 0 <= Decimal(manifest.watermark) <= 1:
        message = f"watermark {manifest.watermark} is no share of the blocks"
        raise SettingsRefused(message, fix="give it between 0 and 1, such as 0.05")
