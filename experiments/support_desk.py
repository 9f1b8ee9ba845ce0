"""What does an hour at the support desk look like?  A workload of held-out questions, made from a seed."""

from __future__ import annotations

import random
from dataclasses import replace

from experiments.workloads import ActivatePackage, Workload, WorkloadRequest

DEFAULT_GAP_US = 60_000
"""Mean time between arrivals: short enough that requests share batches on two cores."""


def support_desk_workload(
    seed: int,
    count: int,
    *,
    mean_gap_us: int = DEFAULT_GAP_US,
    temperature: float | None = None,
    repeat_every: int | None = None,
) -> Workload:
    """Return `count` questions of both tenants with exponential gaps between arrivals.

    Args:
        seed: the deployment's seed, so that its corpus and accounts can answer the questions.
        count: requests, from 1 up.
        mean_gap_us: mean microseconds between arrivals.
        temperature: sampling temperature; None leaves the deployment's own.
        repeat_every: ask the first question again after every so many requests, to compare its answers over time.
    """
    from runtime.models.reference import task

    if count < 1:
        raise ValueError("a workload has at least one request")
    rng = random.Random(f"arrivals {seed}")
    questions = task.questions(seed, count)
    requests: list[WorkloadRequest] = []
    at_us = 0
    for index, question in enumerate(questions):
        chosen = questions[0] if repeat_every and index % repeat_every == 0 else question
        generation: dict[str, object] = {"seed": index}
        if temperature is not None:
            generation["temperature"] = temperature
        requests.append(
            WorkloadRequest(
                at_us=at_us,
                tenant=chosen.tenant,
                question=chosen.text,
                generation=generation,
                expect={"kind": chosen.kind, "outputs": list(chosen.expected)},
            )
        )
        at_us += round(rng.expovariate(1 / mean_gap_us))
    return Workload(name=f"support-desk-{seed}", items=tuple(requests))


def switched_workload(
    seed: int, count: int, *, route: str, package: str, mean_gap_us: int = DEFAULT_GAP_US
) -> Workload:
    """Return a support-desk workload in whose middle `route` is switched to another package: a planted incident.

    The first question is asked again right after the switch, so that one question has an answer from either side.
    Needs at least two requests.
    """
    if count < 2:
        raise ValueError("a switch needs a request on either side")
    plain = support_desk_workload(seed, count, mean_gap_us=mean_gap_us)
    requests = list(plain.requests)
    middle = count // 2
    first = requests[0]
    again = replace(first, at_us=requests[middle].at_us)
    switch = ActivatePackage(at_us=again.at_us, route=route, package=package)
    items = (*requests[:middle], switch, again, *requests[middle + 1 :])
    return Workload(name=f"support-desk-{seed}-switched", items=items)
