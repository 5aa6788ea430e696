"""A real `deepserve.py serve` process for tests, and what the kernel knows of its family."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0  # seconds before a test gives up; nothing here should take a tenth of it


def wait_until(what: str, found: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """The first true value of `found`."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {patience:g} s in vain: {what}")


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def family(marker: str) -> set[int]:
    """Processes that carry `marker` in their environment: a server and all that it started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "environ").read_bytes() and alive(int(entry.name)):
                    found.add(int(entry.name))
            except OSError:
                pass
    return found


def authorization(key: str) -> dict[str, str]:
    """The header that an API key goes in, where there is one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class Server:
    def __init__(self, *args: str | Path, python: str | Path = sys.executable, environment: dict[str, str] | None = None):
        """`python` and `environment`: of another virtual environment."""
        self.marker = f"DEEPSERVE_TEST={os.getpid()}-{time.monotonic_ns()}"
        name, value = self.marker.split("=")
        self.process = subprocess.Popen(
            [str(python), "deepserve.py", "serve", *map(str, args), "--port", "0"],
            cwd=ROOT,
            env={**(os.environ if environment is None else environment), name: value},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)  # as they come: extend consumes the stream

    def __enter__(self) -> Server:
        self.url = wait_until("the server listens", self.listening)
        return self

    def listening(self) -> str | None:
        if self.process.poll() is not None:
            raise AssertionError("the server ended: " + self.stderr())
        match = re.search(r"listening on (\S+?),", self.stderr())
        return match and match[1]

    def stderr(self) -> str:
        return "".join(self.lines)

    def ready(self) -> Server:
        wait_until("the server is ready", lambda: self.listening() and self.get("/health")[0] == 200)
        return self

    def get(self, path: str, key: str = "") -> tuple[int, Any]:
        request = urllib.request.Request(self.url + path, headers=authorization(key))
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                status, body = reply.status, reply.read()
        except urllib.error.HTTPError as e:
            with e:
                status, body = e.code, e.read()
        return status, json.loads(body) if body[:1] in b"{[" else body.decode()

    def post(self, path: str, body: dict[str, Any], key: str = "") -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", **authorization(key)}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as e:
            with e:
                return e.code, json.loads(e.read())

    def tes(self, key: str = "") -> list[dict[str, Any]]:
        return self.get("/v1/admin/te", key)[1]["data"]

    def keeper(self) -> int:
        for pid in family(self.marker):
            with contextlib.suppress(OSError):  # it has just ended
                if Path(f"/proc/{pid}/comm").read_text().startswith("deepserve-keepe"):  # the kernel keeps 15 bytes
                    return pid
        return 0

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.reader.join(10)
        for pipe in (self.process.stderr, self.process.stdout):
            assert pipe is not None
            pipe.close()
        wait_until("every process of the server has ended", lambda: not family(self.marker), 10.0)
