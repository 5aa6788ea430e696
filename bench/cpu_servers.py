"""The servers that `bench.cpu` measures: how each is started, asked, watched and ended.

Each gets the settings that serve it best on a CPU. A server's processes are known by the session it was started in, and by a
marker in their environment: all of them are counted and none outlives its measurement, whether they make sessions of their own
(ours do) or write titles over their environment (vLLM's do).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from bench.peers import LLAMA_VERSION, VLLM_PACKAGES, Peers
from engine.types import UserError
from sched.gateway.client import Client, RequestFailed
from tests.server import family

ROOT = Path(__file__).resolve().parent.parent
NAME = "bench"  # what every server calls its model
MARKER = "DEEPSERVE_BENCH"
STREAMS = 64  # at once, at most
# llama.cpp divides its context among its slots: the longest requests (1024 + 1 tokens) must fit one.
LLAMA_CONTEXT = STREAMS * 1280
VLLM_LENGTH = 2048
VLLM_KV_GB = 4  # as much as ours takes at most
POLL = 0.02  # seconds between attempts to get a first token
SAMPLE_SECONDS, SAMPLE_SHARE = 1.0, 0.02  # memory is read so often, and for no more than this share of a core's time
END_SECONDS = 20.0  # that a server gets to end by itself


class Spec(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    title: str
    kind: Literal["llama.cpp", "vllm", "deepserve"]
    model: str  # a key of Peers.models
    flags: tuple[str, ...] = ()
    arithmetic: Literal["bfloat16", "int8"] = "bfloat16"
    instances: int = 1  # servers at once, each on one core of its own where there are several
    scenarios: tuple[str, ...] = ()  # only these
    seconds: float = 60.0  # that all scenarios take, roughly, on two cores; for the estimate
    start_seconds: float = 5.0

    @property
    def ours(self) -> bool:
        return self.kind == "deepserve"


# Neighbours here are neighbours in time: what is compared stands side by side.
SPECS = (
    Spec("deepserve-bf16", "DeepServe bf16", "deepserve", "bf16", seconds=30),
    Spec("llama.cpp-bf16", "llama.cpp BF16", "llama.cpp", "bf16", seconds=65),
    Spec("vllm-bf16", "vLLM CPU BF16, bound threads", "vllm", "safetensors", seconds=45, start_seconds=100),
    # Sampling in the computation graph: slower for one stream, faster for many.
    Spec("llama.cpp-bf16-bs", "llama.cpp BF16, backend sampling", "llama.cpp", "bf16", ("-bs",), seconds=65),
    Spec("deepserve-q8_0", "DeepServe Q8_0", "deepserve", "q8_0", arithmetic="int8", seconds=30),
    Spec("llama.cpp-q8_0", "llama.cpp Q8_0", "llama.cpp", "q8_0", seconds=80),
    Spec("deepserve-q4_1", "DeepServe Q4_1", "deepserve", "q4_1", arithmetic="int8", seconds=30),
    Spec("llama.cpp-q4_1", "llama.cpp Q4_1", "llama.cpp", "q4_1", seconds=130),
    Spec(
        "deepserve-int8",
        "DeepServe int8 of bf16 safetensors",
        "deepserve",
        "safetensors",
        ("--quantization", "int8"),
        arithmetic="int8",
        seconds=30,
    ),
    Spec("te-1", "DeepServe bf16, one TE", "deepserve", "bf16", ("--te", "1"), scenarios=("te",), seconds=6),
    Spec("te-2", "DeepServe bf16, two TEs", "deepserve", "bf16", ("--te", "2"), scenarios=("te",), seconds=8),
    Spec(
        "te-pinned",
        "DeepServe bf16, two servers of one thread, each pinned to a core",
        "deepserve",
        "bf16",
        instances=2,
        scenarios=("te",),
        seconds=8,
    ),
)


def command(spec: Spec, peers: Peers, port: int, cores: list[int]) -> tuple[list[str], dict[str, str]]:
    """What to run and what to add to the environment."""
    model, threads = str(peers.models[spec.model]), str(len(cores))
    if spec.kind == "deepserve":
        own = [sys.executable, str(ROOT / "deepserve.py"), "serve", model, "--served-model-name", NAME]
        return [*own, "--port", str(port), *spec.flags], {}
    if spec.kind == "llama.cpp":
        size = ["-t", threads, "-tb", threads, "-c", str(LLAMA_CONTEXT), "-np", str(STREAMS)]
        # `-cram 0`: no prompts kept in memory beside the slots; the same speed with 1.4 GB less.
        rest = ["-fa", "on", "-cram", "0", *spec.flags, "-a", NAME, "--host", "127.0.0.1", "--port", str(port)]
        return [str(peers.llama_server), "-m", model, *size, *rest], {}
    limits = ["--dtype", "bfloat16", "--max-model-len", str(VLLM_LENGTH), "--max-num-seqs", str(STREAMS)]
    rest = ["--served-model-name", NAME, "--uvicorn-log-level", "warning", "--host", "127.0.0.1", "--port", str(port)]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GB),
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}" if is_range(cores) else ",".join(map(str, cores)),
        "LD_PRELOAD": ":".join(map(str, peers.preload)),
        "VLLM_CACHE_ROOT": str(peers.vllm_cache),  # what it compiles at its first start is there at the next
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # Not its command `vllm`: that one asks for the version of a package of this name, and the CPU build has another.
    program = [str(peers.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*program, *limits, *spec.flags, *rest], env


def is_range(cores: list[int]) -> bool:
    return len(cores) > 1 and cores == list(range(cores[0], cores[-1] + 1))


def settings(spec: Spec, peers: Peers, cores: list[int]) -> str:
    """The command line with names for paths and without what any server needs: for the result."""
    argv, env = command(spec, peers, 0, cores)
    skip = {"--port", "--host", "--served-model-name", "-a", "--uvicorn-log-level"}
    words, i = [], 0
    while i < len(argv):
        if argv[i] in skip:
            i += 2
            continue
        words.append(Path(argv[i]).name)
        i += 1
    libraries = " ".join(path.name for path in peers.preload)
    known = {"VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"}
    assigned = [f"{k}={v}" for k, v in env.items() if k in known] + ([f'LD_PRELOAD="{libraries}"'] if env and libraries else [])
    note = f" ({'; '.join(peers.notes)})" if spec.kind == "vllm" and peers.notes else ""
    pinned = f"{spec.instances} of: taskset, each to a core: " if spec.instances > 1 else ""
    return pinned + " ".join([*assigned, *words]) + note


def version(spec: Spec, own: str) -> str:
    return {"llama.cpp": f"b{LLAMA_VERSION.split('.')[0]}", "vllm": ", ".join(VLLM_PACKAGES), "deepserve": own}[spec.kind]


# ---- processes, memory and CPU time ------------------------------------------------------------------------------------


def in_sessions(leaders: set[int]) -> set[int]:
    """Living processes of the sessions that these processes began."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) in leaders and state != "Z":
                    found.add(int(entry.name))
    return found


class Memory(msgspec.Struct, frozen=True):
    """Bytes of some processes, a page that n of all processes map counting 1/n: anonymous, and of files and shared memory."""

    private: int = 0
    shared: int = 0

    @property
    def pss(self) -> int:
        return self.private + self.shared


def memory_of(pids: set[int]) -> Memory:
    """Read /proc/PID/smaps_rollup of all; a process that has ended counts nothing."""
    private = shared = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        private += sizes["Pss_Anon"]
        shared += sizes["Pss_File"] + sizes["Pss_Shmem"]
    return Memory(private, shared)


def cpu_seconds(pids: set[int]) -> float:
    """CPU time of all their threads so far, in the scheduler's nanoseconds: clock ticks are too coarse for an idle server."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(thread.read_text().split()[0])
    return total / 1e9


class Watch(threading.Thread):
    """Samples the memory of the processes that `members` finds; `peak` is the highest sum of PSS so far, in bytes."""

    def __init__(self, members: Callable[[], set[int]]):
        super().__init__(daemon=True)
        self.members, self.peak = members, 0
        self.ended = threading.Event()

    def run(self) -> None:
        pause = 0.0
        while not self.ended.wait(pause):
            began = time.thread_time()
            self.sample()
            # Reading it costs the kernel a walk over all pages: for a large server more than once a second would show.
            pause = max(SAMPLE_SECONDS, (time.thread_time() - began) / SAMPLE_SHARE)

    def sample(self) -> None:
        self.peak = max(self.peak, memory_of(self.members()).pss)


# ---- a server -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A spec's processes, from start to end. Use as a context manager."""

    def __init__(self, spec: Spec, peers: Peers):
        self.spec, self.peers = spec, peers
        self.marker = f"{MARKER}={os.getpid()}-{time.monotonic_ns()}"
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in __exit__
        self.processes: list[subprocess.Popen[bytes]] = []
        self.urls: list[str] = []
        self.watch = Watch(self.members)
        self.started = 0.0

    def __enter__(self) -> Server:
        cores = sorted(os.sched_getaffinity(0))
        name, value = self.marker.split("=")
        self.started = time.monotonic()
        try:
            for i in range(self.spec.instances):
                own = cores if self.spec.instances == 1 else [cores[i % len(cores)]]
                port = free_port()
                argv, env = command(self.spec, self.peers, port, own)
                pinned = argv if own == cores else ["taskset", "-c", ",".join(map(str, own)), *argv]
                if setpriv := shutil.which("setpriv"):
                    pinned = [setpriv, "--pdeathsig", "KILL", "--", *pinned]  # where we are killed, no server stays behind
                self.processes.append(
                    subprocess.Popen(
                        pinned,
                        env=os.environ | env | {name: value},
                        stdin=subprocess.DEVNULL,
                        stdout=self.log,
                        stderr=self.log,
                        start_new_session=True,
                    )
                )
                self.urls.append(f"http://127.0.0.1:{port}")
        except OSError as e:
            self.__exit__()
            raise UserError(f"{e.filename}: {e.strerror}") from None
        self.watch.start()
        return self

    def members(self) -> set[int]:
        """All living processes of this server."""
        return family(self.marker) | in_sessions({p.pid for p in self.processes})

    def said(self) -> str:
        """The end of what it has written."""
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - 1500))
        lines = self.log.read().decode("utf-8", "replace").splitlines()
        return " | ".join(line.strip() for line in lines[-6:] if line.strip())

    def check(self) -> None:
        """Raises `UserError` where a process has ended."""
        for process in self.processes:
            if process.poll() is not None:
                raise UserError(f"ended with status {process.returncode}: {self.said()}")

    async def first_token(self, patience: float) -> float:
        """Seconds from the start of the process to the first token streamed to a client that keeps asking; of all instances."""
        took = 0.0
        for url in self.urls:
            took = max(took, await self.one_first_token(url, patience))
        return took

    async def one_first_token(self, url: str, patience: float) -> float:
        why = "it does not listen"
        async with Client(url, fresh=True) as client:
            while time.monotonic() < self.started + patience:
                self.check()
                try:
                    async with asyncio.timeout(patience):
                        async for event in client.complete("Hello", NAME, max_tokens=2, temperature=0.0, ignore_eos=True):
                            if event.text:
                                return event.at - self.started
                except (RequestFailed, TimeoutError) as e:
                    why = str(e)
                await asyncio.sleep(POLL)
        raise UserError(f"no first token within {patience:g} s ({why}): {self.said()}")

    def memory(self) -> Memory:
        return memory_of(self.members())

    def idle_core_percent(self, seconds: float) -> float:
        """CPU time over `seconds` without a request, as a percentage of one core."""
        processes = self.members()
        before, began = cpu_seconds(processes), time.monotonic()
        time.sleep(seconds)
        return 100 * (cpu_seconds(processes) - before) / (time.monotonic() - began)

    def __exit__(self, *_: object) -> None:
        self.watch.ended.set()
        for process in self.processes:
            process.terminate()
        end = time.monotonic() + END_SECONDS
        while self.members() and time.monotonic() < end:
            for process in self.processes:
                process.poll()  # a child that nobody waits for stays a zombie
            time.sleep(0.05)
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        while self.members() and time.monotonic() < end + END_SECONDS:
            time.sleep(0.05)
        if self.watch.is_alive():
            self.watch.join(END_SECONDS)
        self.log.close()
