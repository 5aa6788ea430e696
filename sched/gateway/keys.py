"""What handlers find on the application and on a request."""

from __future__ import annotations

from aiohttp import web

from sched.gateway.face import Service
from sched.gateway.sse import Heart

SERVICE = web.AppKey("service", Service)
HEART = web.AppKey("heart", Heart)
VERSION = web.AppKey("version", str)
FINGERPRINT = web.AppKey("fingerprint", str)  # `system_fingerprint` of replies: changes with the code that made them

REQUEST_ID = web.RequestKey("request_id", str)  # sent back as X-Request-Id
CALLER_ID = web.RequestKey("caller_id", str)  # the caller's own X-Request-Id, or empty
TENANT = web.RequestKey("tenant", bytes)  # separates the prefix caches of different keys
