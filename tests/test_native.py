"""The compiled helper: how it is built and found, and what fork.c does."""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine import native
from engine.types import UserError


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The native folder's sources somewhere else, not built, with a DEEPSERVE_HOME beside it."""
    here = tmp_path / "native"
    here.mkdir()
    for source in native.SOURCES:
        shutil.copy(native.HERE / source, here)
    monkeypatch.setattr(native, "HERE", here)
    monkeypatch.setenv("DEEPSERVE_HOME", str(tmp_path / "home"))
    return here


def test_built_beside_the_sources_and_found_again(copy: Path) -> None:
    assert native.find() is None
    path = native.build()
    assert path.parent == copy / "build"
    assert native.find() == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no draft left behind
    native.Library(path)  # every function of the tables is there


def test_a_changed_source_is_another_library(copy: Path) -> None:
    path = native.build()
    with (copy / "fork.c").open("a") as f:
        f.write("/* changed */\n")
    assert native.find() is None
    assert native.build() != path


def test_built_in_the_home_folder_where_the_sources_are_read_only(copy: Path, tmp_path: Path) -> None:
    (copy / "build").write_text("a file where the folder would be")
    path = native.build()
    assert path.parent == tmp_path / "home" / "native"
    assert native.find() == path


def test_nowhere_to_write_says_what_to_set(copy: Path, tmp_path: Path) -> None:
    (copy / "build").touch()
    (tmp_path / "home").touch()
    with pytest.raises(UserError, match="DEEPSERVE_HOME"):
        native.build()


def test_no_compiler_says_what_to_install(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = native.build()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.find() == built  # a built library needs none
    with pytest.raises(UserError, match="apt install gcc"):
        native.build()
    monkeypatch.setenv("CC", "no-such-cc -O3")
    with pytest.raises(UserError, match="CC=no-such-cc"):
        native.build()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(copy: Path) -> None:
    with (copy / "fork.c").open("a") as f:
        f.write("this is not C\n")
    with pytest.raises(UserError, match=r"fork\.c"):
        native.build()
    assert list((copy / "build").iterdir()) == []


def test_two_builds_at_once(copy: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(native.build())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths[0] == paths[1]
    assert list(paths[0].parent.iterdir()) == [paths[0]]


def test_command_says_it_is_up_to_date() -> None:
    native.load()
    done = subprocess.run([sys.executable, "-m", "engine.native"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("native helper: up to date (")
    assert done.stdout.count("up to date") + done.stdout.count("built in") == 2, (
        "a line for the helper and one for the CPU kernels"
    )


# ---- fork.c ----------------------------------------------------------------------------------------------------------


def forked(body: Callable[[], None]) -> int:
    """A child that runs `body`; exits with 1 when it returns or raises."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    """Of a child that must end by itself."""
    pidfd = os.pidfd_open(pid)
    ended, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.fail(f"process {pid} lives on")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def say_ready_and_spin(fd: int) -> None:
    os.write(fd, b"x")
    while True:  # never gives a signal-handling or cooperative watcher a chance
        pass


def test_a_process_ends_with_the_one_it_watches() -> None:
    watched = forked(signal.pause)
    pidfd = os.pidfd_open(watched)
    ready, says = os.pipe()

    def body() -> None:
        native.watch_process(pidfd)
        os.close(pidfd)  # the watch keeps its own
        say_ready_and_spin(says)

    watcher = forked(body)
    os.read(ready, 1)
    assert os.waitpid(watcher, os.WNOHANG) == (0, 0)
    os.kill(watched, signal.SIGKILL)
    assert exit_code(watched) == -signal.SIGKILL
    assert exit_code(watcher) == 0
    for fd in (pidfd, ready, says):
        os.close(fd)


def test_a_pipe_can_be_watched_too() -> None:
    hold_read, hold_write = os.pipe()
    ready, says = os.pipe()

    def body() -> None:
        os.close(hold_write)
        native.watch_process(hold_read)
        say_ready_and_spin(says)

    watcher = forked(body)
    os.read(ready, 1)
    os.close(hold_write)
    assert exit_code(watcher) == 0
    for fd in (hold_read, ready, says):
        os.close(fd)


def test_watching_leaves_signals_to_the_interpreter() -> None:
    ready, says = os.pipe()

    def body() -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        native.watch_process(os.pidfd_open(os.getppid()))
        say_ready_and_spin(says)

    watcher = forked(body)
    os.read(ready, 1)
    os.kill(watcher, signal.SIGTERM)
    assert exit_code(watcher) == 7
    os.close(ready)
    os.close(says)


def test_watching_a_closed_descriptor_is_an_error() -> None:
    fd = os.pidfd_open(os.getpid())
    os.close(fd)
    with pytest.raises(OSError, match=f"pidfd {fd}"):
        native.watch_process(fd)


def test_process_name() -> None:
    def body() -> None:
        native.set_process_name("ds-te-3-and-more-letters")
        os._exit(0 if Path("/proc/self/comm").read_text() == "ds-te-3-and-mor\n" else 2)

    assert exit_code(forked(body)) == 0


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # from the xxhash package 3.x; every branch of the tail is taken
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (bytes(range(256)) * 3, 0x8E03C838C596036F),
        (bytes(range(256)) * 3 + b"xyz1234", 0x559EA82AFE8F46C9),
    ],
)
def test_checksum_is_xxh64(data: bytes, expected: int) -> None:
    assert native.checksum(data) == expected
    assert native.checksum(memoryview(bytearray(data))) == expected


def test_checksum_of_an_array_is_of_its_bytes() -> None:
    weights = np.arange(1000, dtype=np.float32).reshape(10, 100)
    assert native.checksum(weights) == native.checksum(weights.tobytes())
    changed = weights.copy()
    changed[9, 99] = -1.0
    assert native.checksum(changed) != native.checksum(weights)


# ---- slabs -----------------------------------------------------------------------------------------------------------


def test_a_slab_is_one_memory_for_all_and_goes_with_its_last_view():
    size, huge = 4 << 20, 2 << 20
    fd = os.memfd_create("a-slab-of-this-test")
    os.ftruncate(fd, size)
    ours, theirs = native.map_slab(fd, size, writable=True), native.map_slab(fd, size)
    os.close(fd)
    assert ours.nbytes == theirs.nbytes == size and theirs.readonly and not any(theirs[::4096])
    ours[huge - 1 : huge + 1] = b"ab"
    assert theirs[huge - 1 : huge + 1] == b"ab"
    part = theirs[-8:]

    def mapped() -> list[int]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [int(line.split("-")[0], 16) for line in lines if "a-slab-of-this-test" in line]

    assert len(mapped()) == 2 and all(start % huge == 0 for start in mapped())
    del ours, theirs
    assert len(mapped()) == 1 and bytes(part) == bytes(8)
    del part
    assert not mapped()


def test_a_slab_of_what_is_no_memory_is_refused():
    with pytest.raises(OSError, match="mapping a slab of 2097152 bytes"):
        native.map_slab(-1, 2 << 20)
    assert native.map_slab(-1, 0).nbytes == 0
