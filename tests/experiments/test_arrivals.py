"""Requests go out at their times, whatever the answers do; a stopped run ends cleanly."""

from __future__ import annotations

import asyncio

from experiments.arrivals import Clock, Sent, play
from experiments.workloads import ActivatePackage, Workload, WorkloadItem, WorkloadRequest


class StillClock:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0

    async def sleep(self, us: int) -> None:
        self.now += us
        await asyncio.sleep(0)

    def clock(self) -> Clock:
        return Clock(now_us=lambda: self.now, sleep_us=self.sleep)


def _request(at_us: int) -> WorkloadRequest:
    return WorkloadRequest(at_us=at_us, tenant="a", question=str(at_us))


def _play(items: tuple[WorkloadItem, ...], *, speed: float = 1.0) -> tuple[list[tuple[int, str]], list[Sent[str]]]:
    still = StillClock()
    log: list[tuple[int, str]] = []

    async def submit(request: WorkloadRequest) -> str:
        log.append((still.now, f"send {request.question}"))
        if request.question == "666":
            raise ValueError("broken")
        return f"answer {request.question}"

    async def activate(control: ActivatePackage) -> None:
        log.append((still.now, f"activate {control.package}"))

    load = Workload(name="w", items=items)
    sent = asyncio.run(play(load, submit=submit, activate=activate, speed=speed, clock=still.clock()))
    return log, sent


def test_requests_and_controls_go_out_in_order_at_their_times() -> None:
    items = (_request(0), _request(10), ActivatePackage(at_us=20, route="r", package="p"), _request(30))
    log, sent = _play(items)
    assert log == [(0, "send 0"), (10, "send 10"), (20, "activate p"), (30, "send 30")]
    assert [one.answer for one in sent] == ["answer 0", "answer 10", "answer 30"]
    assert [one.lag_us for one in sent] == [0, 0, 0]


def test_speed_divides_the_times() -> None:
    log, _ = _play((_request(0), _request(100)), speed=4)
    assert log[1][0] == 25


def test_a_request_that_fails_is_an_outcome_and_the_others_go_on() -> None:
    _, sent = _play((_request(1), _request(666), _request(700)))
    assert [one.answer for one in sent] == ["answer 1", None, "answer 700"]
    assert isinstance(sent[1].error, ValueError)


def test_a_stopped_run_sends_nothing_more_and_cancels_what_is_under_way() -> None:
    async def trial() -> list[Sent[str]]:
        stop = asyncio.Event()

        async def submit(request: WorkloadRequest) -> str:
            if request.at_us == 1:
                stop.set()
            await asyncio.sleep(60)
            return "never"

        async def activate(control: ActivatePackage) -> None:
            raise AssertionError("no control here")

        load = Workload(name="w", items=(_request(0), _request(1), _request(60_000_000)))
        return await play(load, submit=submit, activate=activate, stop=stop)

    sent = asyncio.run(asyncio.wait_for(trial(), 10))
    assert [(one.request.at_us, one.answer, one.error) for one in sent] == [(0, None, None), (1, None, None)]


def test_lag_counts_until_the_request_really_goes_out() -> None:
    still = StillClock()

    async def submit(request: WorkloadRequest) -> int:
        now = still.now
        still.now += 7  # sending keeps the loop busy, so whoever is due now goes out late
        return now

    async def activate(control: ActivatePackage) -> None:
        raise AssertionError("no control here")

    load = Workload(name="w", items=tuple(_request(0) for _ in range(3)))
    sent = asyncio.run(play(load, submit=submit, activate=activate, clock=still.clock()))
    assert [one.lag_us for one in sent] == [one.answer for one in sent] == [0, 7, 14]
