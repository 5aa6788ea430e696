"""The shared-memory queue: order, wholeness, back-pressure, sleeping, death of an end."""

import asyncio
import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import native, shmq
from engine.shmq import Receiver, RingFds, Sender


@contextlib.contextmanager
def queue(capacity: int = 1 << 16) -> Iterator[tuple[Sender, Receiver]]:
    """Both ends in this process, each with its own mapping."""
    fds = shmq.create(capacity)
    sender, receiver = Sender(fds), Receiver(fds)
    fds.close()
    try:
        yield sender, receiver
    finally:
        sender.close()
        receiver.close()


@contextlib.contextmanager
def child(body: Callable[[], None]) -> Iterator[int]:
    """A forked process; it must have ended well, or have been killed here, when the block ends."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)


def run_both(main: Callable[[], Awaitable[None]]) -> None:
    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(main(), 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it is turns of the loop that are waited for
        await asyncio.sleep(0)


def stream(seed: int, longest: int) -> Iterator[bytes]:
    """An endless run of messages that both sides of a test know: sizes mixed, content checkable."""
    rng = random.Random(seed)
    while True:
        yield rng.randbytes(int(longest ** rng.random()) if rng.random() < 0.95 else 0)


def receive_all(receiver: Receiver) -> Iterator[bytes]:
    """Blocking, until the sender has closed."""
    with contextlib.suppress(EOFError):
        while True:
            assert receiver.wait(30), "the sender fell silent"
            yield from receiver.receive()


# ---- order and wholeness --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([64, 128, 1024]),
    st.lists(st.one_of(st.integers(0, 300), st.just("receive"), st.just("flush")), max_size=80),
)
def test_any_interleaving_delivers_everything_once_in_order(capacity: int, steps: list[int | str]) -> None:
    sent: list[bytes] = []
    got: list[bytes] = []
    with queue(capacity) as (sender, receiver):
        for number, step in enumerate(steps):
            if step == "receive":
                got += receiver.receive()
            elif step == "flush":
                assert sender.flush() == (sender.backlog == 0)
            else:
                sent.append(bytes([number]) * int(step))
                sender.send(sent[-1])
            assert got == sent[: len(got)]
        while not sender.flush():
            got += receiver.receive()
        got += receiver.receive()
        assert got == sent
        assert receiver.receive() == []


def test_every_length_at_every_offset_of_a_tiny_ring() -> None:
    with queue(64) as (sender, receiver):
        for length in range(65):
            for _ in range(8):  # the ring's place moves by 8 bytes each time
                sender.send(b"")
                assert receiver.receive() == [b""]
                message = os.urandom(length)
                got: list[bytes] = []
                sender.send(message)
                while not sender.flush():
                    got += receiver.receive()
                assert got + receiver.receive() == [message]


def test_a_message_larger_than_the_ring_travels_whole() -> None:
    message = os.urandom(1_000_003)
    with queue(4096) as (sender, receiver):
        sender.send(message)
        sender.send(b"next")
        assert sender.backlog == 2
        got: list[bytes] = []
        while not sender.flush():
            got += receiver.receive()
        got += receiver.receive()
        assert got == [message, b"next"]


def test_more_records_than_one_call_takes() -> None:
    messages = [b"%d" % i for i in range(3 * shmq.POP_RECORDS + 5)]
    with queue() as (sender, receiver):
        for message in messages:
            sender.send(message)
        assert sender.backlog == 0
        assert receiver.receive() == messages


def test_a_full_ring_holds_the_rest_back_in_order() -> None:
    messages = [bytes([i]) * 100 for i in range(50)]
    with queue(1024) as (sender, receiver):
        for message in messages:
            sender.send(message)
        assert sender.backlog > 0
        assert not sender.flush_blocking(0.01)
        got = receiver.receive()
        assert 0 < len(got) < 50
        while not sender.flush():
            got += receiver.receive()
        assert got + receiver.receive() == messages


@pytest.mark.parametrize("capacity", [256, 1 << 14])
def test_across_processes(capacity: int) -> None:
    count, longest = 2000, capacity * 2
    fds = shmq.create(capacity)

    def body() -> None:
        sender = Sender(fds)
        for _, message in zip(range(count), stream(7, longest), strict=False):
            sender.send(message)
            if sender.backlog > 50:
                assert sender.flush_blocking(30)
        assert sender.flush_blocking(30)
        sender.close()

    with child(body):
        receiver = Receiver(fds)
        fds.close()
        got = receive_all(receiver)
        for expected in (m for _, m in zip(range(count), stream(7, longest), strict=False)):
            assert next(got) == expected
        assert next(got, None) is None
        receiver.close()


def test_with_a_process_that_shares_nothing_but_descriptors() -> None:
    there, back = shmq.create(4096), shmq.create(4096)
    code = (
        "import sys; from engine.shmq import *; n = list(map(int, sys.argv[1:]));"
        "r, s = Receiver(RingFds(*n[:3])), Sender(RingFds(*n[3:]));"
        "r.wait(30); s.send(r.receive()[0][::-1]); s.flush_blocking(30)"
    )
    numbers = there.numbers() + back.numbers()
    sender, receiver = Sender(there), Receiver(back)
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, numbers)], pass_fds=numbers)
    there.close()
    back.close()
    sender.send(b"hello")
    assert receiver.wait(30)
    assert receiver.receive() == [b"olleh"]
    assert process.wait(30) == 0
    sender.close()
    receiver.close()


# ---- sleeping and waking --------------------------------------------------------------------------------------------


def echo(requests: RingFds, replies: RingFds) -> None:
    receiver, sender = Receiver(requests), Sender(replies)
    for message in receive_all(receiver):
        sender.send(message)
        assert sender.flush_blocking(30)


def test_no_wake_up_is_lost_in_20000_ping_pongs() -> None:
    requests, replies = shmq.create(256), shmq.create(256)
    with child(lambda: echo(requests, replies)):
        sender, receiver = Sender(requests), Receiver(replies)
        for i in range(20_000):
            message = b"%d" % i
            sender.send(message)
            assert receiver.wait(30), f"no answer to {i}"
            assert receiver.receive() == [message]
        sender.close()
    receiver.close()
    requests.close()
    replies.close()


def test_no_wake_up_is_lost_in_event_loops() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        requests, replies = shmq.create(256), shmq.create(256)
        with child(lambda: echo(requests, replies)):
            sender, receiver = Sender(requests), Receiver(replies)
            arrived: asyncio.Queue[bytes] = asyncio.Queue()
            sender.attach(loop)
            receiver.attach(loop, lambda messages: [arrived.put_nowait(m) for m in messages] and None)
            for i in range(4000):
                burst = [b"%d-%d" % (i, j) for j in range(1 + i % 3 * 15)]  # some overflow the ring, both ways
                for message in burst:
                    sender.send(message)
                assert [await arrived.get() for _ in burst] == burst
                if i % 50 == 0:
                    await asyncio.sleep(0.001)  # everybody asleep for once
            sender.close()
        receiver.close()
        requests.close()
        replies.close()

    run_both(main)


def test_wait_times_out_and_returns_at_once_when_something_is_there() -> None:
    with queue() as (sender, receiver):
        assert not receiver.wait(0)
        assert not receiver.wait(0.01)
        sender.send(b"x")
        assert receiver.wait(0)
        assert receiver.wait(None)
        assert receiver.receive() == [b"x"]
        assert not receiver.wait(0)


def test_signals_are_handled_while_waiting() -> None:
    with queue() as (sender, receiver):
        before = signal.signal(signal.SIGALRM, lambda *_: sender.send(b"from the handler"))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            assert receiver.wait(30)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert receiver.receive() == [b"from the handler"]


# ---- in an event loop -----------------------------------------------------------------------------------------------


def test_a_full_ring_makes_the_sender_wait_without_blocking_the_loop() -> None:
    messages = [os.urandom(700 + i) for i in range(300)] + [os.urandom(50_000)]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with queue(4096) as (sender, receiver):
            sender.attach(loop)
            for message in messages:
                sender.send(message)
            assert sender.backlog > 0
            waiting = sender.backlog
            await asyncio.sleep(0.01)  # the loop turns while the ring is full
            assert sender.backlog == waiting
            got: list[bytes] = []
            receiver.attach(loop, got.extend)
            await until(lambda: sender.backlog == 0)
            await until(lambda: len(got) == len(messages))
            assert got == messages

    run_both(main)


def test_batches_are_bounded_and_others_get_their_turn() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with queue(1 << 20) as (sender, receiver):
            sizes: list[int] = []
            turns: list[int] = []
            done = loop.create_future()

            def on_messages(messages: list[bytes]) -> None:
                sizes.append(len(messages))
                loop.call_soon(lambda: turns.append(len(sizes)))
                if sum(sizes) == 1000:
                    done.set_result(None)

            for _ in range(1000):
                sender.send(b"x" * 64)
            receiver.attach(loop, on_messages)
            await done
            assert max(sizes) == shmq.BATCH_RECORDS
            assert turns[:3] == [1, 2, 3]

            sizes.clear()
            done = loop.create_future()
            receiver.detach()
            for _ in range(8):
                sender.send(bytes(100_000))
            receiver.attach(loop, lambda messages: sizes.append(len(messages)))
            await until(lambda: sum(sizes) == 8)
            assert max(sizes) <= 2

    run_both(main)


def test_detach_from_the_callback_and_attach_again() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with queue() as (sender, receiver):
            got: list[bytes] = []

            def once(messages: list[bytes]) -> None:
                got.extend(messages)
                receiver.detach()

            receiver.attach(loop, once)
            sender.send(b"1")
            await until(lambda: len(got) == 1)
            sender.send(b"2")
            await asyncio.sleep(0.01)
            assert got == [b"1"]
            receiver.attach(loop, once)
            await until(lambda: len(got) == 2)
            assert got == [b"1", b"2"]
            receiver.attach(loop, lambda messages: receiver.close())
            sender.send(b"3")
            await until(lambda: sender.peer_closed)

    run_both(main)


def test_a_callback_that_raises_does_not_stop_the_queue() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        errors: list[object] = []
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        with queue() as (sender, receiver):
            got: list[bytes] = []

            def on_messages(messages: list[bytes]) -> None:
                got.extend(messages)
                raise KeyError("mine")

            receiver.attach(loop, on_messages)
            for i in range(3):
                sender.send(b"x")
                await until(lambda wanted=i + 1: len(errors) == wanted)
            assert got == [b"x"] * 3
            assert [type(e) for e in errors] == [KeyError] * 3

    run_both(main)


@pytest.mark.parametrize("first", ["sender waits", "receiver closes"])
def test_a_receiver_that_closes_frees_a_waiting_sender(first: str) -> None:
    async def main() -> None:
        with queue(64) as (sender, receiver):
            for _ in range(20):
                sender.send(b"a message")
            if first == "receiver closes":
                receiver.close()
            sender.attach(asyncio.get_running_loop())
            assert sender.backlog > 0
            await asyncio.sleep(0)
            receiver.close()
            await until(lambda: sender.backlog == 0)
            assert sender.peer_closed
            sender.send(b"nobody will read this")
            assert sender.backlog == 0

    run_both(main)


def test_ends_close_after_their_loop() -> None:
    with queue(64) as (sender, receiver):

        async def main() -> None:
            sender.attach(asyncio.get_running_loop())
            receiver.attach(asyncio.get_running_loop(), lambda messages: None)
            for _ in range(20):
                sender.send(b"a message")

        asyncio.run(main())


# ---- ends that go away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_sender_leaves_a_prefix_of_whole_messages(seed: int) -> None:
    # Large records keep the sender inside a push most of the time, so that is where it is killed.
    capacity, longest = ((1 << 12, 10_000), (1 << 20, 4_000_000))[seed % 2]
    fds = shmq.create(capacity)

    def body() -> None:
        sender = Sender(fds)
        for message in stream(seed, longest):
            sender.send(message)
            sender.flush_blocking()

    with child(body) as pid:
        receiver = Receiver(fds)
        fds.close()
        expected = stream(seed, longest)
        wanted = random.Random(seed).randrange(500 if seed % 2 == 0 else 60)
        seen = 0
        while seen < wanted:
            assert receiver.wait(30)
            for message in receiver.receive():
                assert message == next(expected)
                seen += 1
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        for message in receiver.receive():
            assert message == next(expected)
        assert not receiver.wait(0)
        assert not receiver.peer_closed
        receiver.close()


def test_what_was_sent_before_closing_arrives_and_then_comes_the_end() -> None:
    with queue() as (sender, receiver):
        sender.send(b"last")
        sender.close()
        assert receiver.wait(0)
        assert receiver.peer_closed
        assert receiver.receive() == [b"last"]
        with pytest.raises(EOFError):
            receiver.wait(None)
        assert receiver.receive() == []


def test_closed_ends_say_so() -> None:
    with queue() as (sender, receiver):
        sender.close()
        receiver.close()
        sender.close()
        receiver.close()
        for call in (lambda: sender.send(b"x"), sender.beat, receiver.receive, lambda: receiver.wait(0)):
            with pytest.raises(ValueError, match="closed"):
                call()


def test_only_bytes_are_messages() -> None:
    with queue() as (sender, receiver):
        for wrong in ("text", bytearray(b"x"), 5):
            with pytest.raises(TypeError, match=type(wrong).__name__):
                sender.send(wrong)  # type: ignore[arg-type]
        assert receiver.receive() == []


def test_heartbeat() -> None:
    with queue() as (sender, receiver):
        assert receiver.last_beat() == 0.0
        before = time.monotonic()
        sender.beat()
        assert before - 1e-3 <= receiver.last_beat() <= time.monotonic() + 1e-3
        assert sender.last_beat() == receiver.last_beat()


def test_nothing_leaks() -> None:
    def held() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), maps.read().count("deepserve-queue")

    async def main() -> None:
        with queue(64) as (sender, receiver):
            sender.attach(asyncio.get_running_loop())
            receiver.attach(asyncio.get_running_loop(), lambda messages: None)
            for _ in range(20):
                sender.send(b"a message")
            await until(lambda: sender.backlog == 0)

    run_both(main)
    before = held()
    for _ in range(3):
        run_both(main)
    fds = shmq.create()
    fds.close()
    fds.close()
    assert held() == before


# ---- memory that is not a queue, or no longer one -------------------------------------------------------------------


def test_foreign_memory_is_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))
    good = shmq.create(1024)
    header = os.pread(good.memory, 24, 0)
    size = native.load().ring_size(1024)
    cases = {
        "empty": b"",
        "zeros": bytes(size),
        "another magic": b"x" + header[1:] + bytes(size - 24),
        "another version": header[:8] + struct.pack("<I", 99) + header[12:] + bytes(size - 24),
        "another size": header[:12] + struct.pack("<I", 2048) + header[16:] + bytes(size - 24),
        "cut short": header + bytes(size - 25),
    }
    for name, content in cases.items():
        memory = os.memfd_create(name)
        os.write(memory, content)
        for opened in (Sender, Receiver):
            with pytest.raises(ValueError, match="not a queue"):
                opened(RingFds(memory, good.data_bell, good.space_bell))
        os.close(memory)
    with pytest.raises(OSError):
        Sender(RingFds(-1, good.data_bell, good.space_bell))
    good.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("capacity", [0, 32, 1000, 1 << 31])
def test_capacities_that_cannot_be(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity={capacity}: must be a power of two"):
        shmq.create(capacity)


def test_the_memory_cannot_be_resized_under_an_end() -> None:
    fds = shmq.create(1024)
    with pytest.raises(PermissionError):
        os.ftruncate(fds.memory, 0)
    fds.close()


@pytest.mark.parametrize("place", ["head", "tail", "record"])
def test_corrupt_memory_is_reported_and_not_followed(place: str) -> None:
    fds = shmq.create(1024)
    sender, receiver = Sender(fds), Receiver(fds)
    sender.send(b"x" * 400)
    offset = {"head": 128, "tail": 256, "record": 1024}[place]
    os.pwrite(fds.memory, struct.pack("<I", 0x7FFFFFF0), offset)
    with pytest.raises(RuntimeError, match="corrupt"):
        if place == "tail":
            sender.send(b"x" * 400)
            sender.send(b"x" * 400)
        else:
            receiver.receive()

    async def main() -> None:  # the loop hears of it once, and goes on
        errors: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        receiver.attach(loop, lambda messages: None)
        await asyncio.sleep(0.01)
        assert len(errors) == 1

    if place != "tail":
        run_both(main)
    with contextlib.suppress(RuntimeError):
        sender.close()
    receiver.close()
    fds.close()


def test_a_wait_is_ended_from_another_thread_before_and_while_it_lasts():
    fds = shmq.create(1 << 12)
    sender, receiver = shmq.Sender(fds), shmq.Receiver(fds)
    receiver.rouse()
    assert receiver.wait(None) and not receiver.wait(0.0)
    for _ in range(200):
        thread = threading.Thread(target=receiver.rouse)
        thread.start()
        assert receiver.wait(None) and receiver.receive() == []
        thread.join()
    sender.send(b"x")
    assert receiver.wait(None) and receiver.receive() == [b"x"] and not receiver.wait(0.0)
    sender.close()
    receiver.close()
    fds.close()
