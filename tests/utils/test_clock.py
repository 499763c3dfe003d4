"""Timers count the time in which this process runs, whatever its clock does."""

from __future__ import annotations

import asyncio
import time

import pytest

from glmd.utils.clock import MAX_PAUSE, TICK_SECONDS, AwakeClock


class JumpingClock:
    """A clock that can be moved."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 1e9, MAX_PAUSE + 1])
def test_a_pause_counts_as_a_tick(jump: float) -> None:
    moments = iter([10.0, 11.0, 11.0 + jump, 12.0 + jump])
    clock = AwakeClock(lambda: next(moments))
    assert [clock(), clock(), clock()] == pytest.approx(
        [11.0, 11.0 + TICK_SECONDS, 12.0 + TICK_SECONDS]
    )


def test_no_timer_fires_for_time_that_was_slept_and_others_do() -> None:
    source = JumpingClock()

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        AwakeClock(source).drive(loop)
        fired: list[str] = []
        loop.call_later(20, fired.append, "deadline")
        async with asyncio.timeout(30):
            source.offset += 3600
            await asyncio.sleep(0.01)
            source.offset += 3600
            await asyncio.sleep(0.01)
        return fired

    assert asyncio.run(main()) == []


def test_an_idle_loop_is_awake() -> None:
    """Nothing but the clock itself wakes the loop before the timer."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        AwakeClock().drive(loop)
        start = time.monotonic()
        await asyncio.sleep(MAX_PAUSE + 0.5)
        assert time.monotonic() - start >= MAX_PAUSE

    asyncio.run(main())
