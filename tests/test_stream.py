"""A stream between the service that feeds it and the one who reads: what wakes a coroutine, and who suffers from a fault."""

from __future__ import annotations

import asyncio

import pytest

from sched.stream import Delta, Stream


def delta(text: str, finish: str | None = None) -> Delta:
    return Delta(0, text, [1], None, finish)


def test_a_token_wakes_no_coroutine() -> None:
    async def run() -> None:
        stream, got = Stream(1), []
        running = asyncio.create_task(stream.run(got.extend))
        await asyncio.sleep(0)
        for i in range(5):
            stream.feed([delta("x")])
            assert len(got) == i + 1, "delivered within the call"
            assert stream.wake is not None and not stream.wake.done()
        stream.feed([delta("y", "stop")])
        assert stream.wake is not None and stream.wake.done(), "the end wakes it"
        await running
        assert "".join(d.text for d in got) == "xxxxxy"

    asyncio.run(run())


def test_what_came_before_the_reader_is_kept_for_it() -> None:
    async def run() -> None:
        stream, got = Stream(1), []
        stream.feed([delta("a")])
        stream.feed([delta("b", "length")])
        await stream.run(got.extend)
        assert [d.text for d in got] == ["a", "b"]

    asyncio.run(run())


def test_the_newest_note_is_kept_for_the_reader_and_later_ones_come_as_they_are() -> None:
    async def run() -> None:
        stream, notes = Stream(1), []
        stream.note("0 %")
        stream.note("40 %")
        running = asyncio.create_task(stream.run(lambda _: None, notes.append))
        await asyncio.sleep(0)
        stream.note("80 %")
        assert notes == ["40 %", "80 %"]
        stream.feed([delta("a", "stop")])
        await running

    asyncio.run(run())


def test_a_sink_that_fails_is_told_to_its_own_reader() -> None:
    def broken(deltas: list[Delta]) -> None:
        raise ZeroDivisionError("in the sink")

    async def run() -> None:
        stream = Stream(1)
        running = asyncio.create_task(stream.run(broken))
        await asyncio.sleep(0)
        stream.feed([delta("a")])  # raises nothing here, where other streams' tokens are worked off
        with pytest.raises(ZeroDivisionError):
            await running

    asyncio.run(run())


def test_a_reader_without_a_sink_gets_steps_together() -> None:
    async def run() -> None:
        stream, seen = Stream(1), []

        async def read() -> None:
            async for deltas in stream:
                seen.append("".join(d.text for d in deltas))

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        stream.feed([delta("a")])
        stream.feed([delta("b")])
        await asyncio.sleep(0)
        stream.feed([delta("c", "stop")])
        await reading
        assert seen == ["ab", "c"]

    asyncio.run(run())
