"""Prefill and decode on an NPU each, KV blocks between them by the runtime's exports: tests/npu/pd_cases.py in the npu
environment, over the stub."""

from __future__ import annotations

import pytest

from tests.npu import environment
from tests.npu.stub import Unavailable

CASES = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "error::UserWarning", "tests/npu/pd_cases.py"]


def test_prefill_and_decode_over_the_stub():
    try:
        environment.python()
    except Unavailable as e:
        pytest.skip(str(e))
    environment.run(CASES, timeout=300)
