"""OpenAI's error object, and which exception becomes which status. Knows nothing of routes."""

from __future__ import annotations

import math
from typing import Any

import orjson
from aiohttp import web

from engine.types import UserError
from sched.contexts import UnknownContext
from sched.stream import Expired, Overloaded, TaskFailed, Unavailable, UnknownModel

LONGEST = 2000  # characters of an error message: a caller's 1 MB field name need not come back whole

# Of every other status: invalid_request_error.
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}
CODES = {
    401: "invalid_api_key",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "service_unavailable",
    504: "deadline_exceeded",
}
BROKEN_PROMISES = ("ttft", "tpot", "deadline")  # causes of an early refusal


class Problem(Exception):
    """A refusal ready to be sent: message to a person, field at fault, status."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        partial: bytes | None = None,
    ):
        """`partial`: the reply as far as it has come, as JSON."""
        super().__init__(message)
        self.message = message if len(message) <= LONGEST else message[:LONGEST] + " …"
        self.param = param if param is None or len(param) <= LONGEST else param[:LONGEST]
        self.status = status
        self.code = code or CODES.get(status)
        self.headers = headers or {}
        self.partial = partial

    def body(self) -> bytes:
        """`{"error": {...}}`, and `"partial": {...}` beside it where there is one."""
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        # A field name may hold what JSON can't (a lone surrogate from a URL, say): such characters are replaced.
        clean = {k: v.encode("utf-8", "replace").decode() if v is not None else None for k, v in error.items()}
        whole: dict[str, Any] = {"error": clean}
        if self.partial is not None:
            whole["partial"] = orjson.Fragment(self.partial)
        return orjson.dumps(whole)


def retry_after(seconds: float) -> dict[str, str]:
    """The header takes whole seconds; 0 would invite a busy loop."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def problem(error: BaseException, request: web.Request) -> Problem | None:
    """The refusal that `error` means, or None where it is a fault of ours."""
    match error:
        case Problem():
            return error
        case UnknownContext():
            return Problem(str(error), error.param, status=404, code="context_not_found")
        case UnknownModel():
            return Problem(str(error), error.param or "model", status=404, code="model_not_found")
        case UserError():
            return Problem(str(error), error.param)
        case Overloaded():
            code = "slo_unreachable" if error.cause in BROKEN_PROMISES else None
            return Problem(str(error), status=429, code=code, headers=retry_after(error.retry_after))
        case Unavailable():
            return Problem(str(error), status=503, headers=retry_after(error.retry_after))
        case Expired():
            return late(error)
        case TaskFailed():
            return Problem(str(error), status=500, code="task_failed")
        case RecursionError():
            return Problem("the body is nested too deeply")
        case web.HTTPRequestEntityTooLarge():
            return Problem(f"the body is larger than {request.client_max_size >> 20} MiB", status=413)
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.path} takes {allowed}, not {request.method}"
            return Problem(message, status=405, code="method_not_allowed", headers={"Allow": allowed})
        case web.HTTPNotFound():
            return Problem(f"there is no {request.method} {request.path} here", status=404, code="not_found")
        case web.HTTPException():
            return Problem(error.reason, status=error.status)
        case web.RequestPayloadError():
            return Problem("the body could not be read: it is not what its Content-Encoding or length says")
    return None


def late(error: Expired, partial: bytes | None = None) -> Problem:
    """Client libraries send again what got a 5xx; this one would only take as long once more."""
    return Problem(str(error), status=504, headers={"x-should-retry": "false"}, partial=partial)


def response(found: Problem) -> web.Response:
    return web.Response(status=found.status, body=found.body(), content_type="application/json", headers=found.headers)
