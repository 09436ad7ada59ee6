"""Requests and answers: the table of routes, the log, and faults."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from hub_server.server import HubServer
    from hub_server.state import User


@dataclass(frozen=True)
class LoggedRequest:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    status: int | None  # None: the connection was dropped


@dataclass
class Fault:
    method: str
    pattern: re.Pattern[str]
    status: int | None  # None: drop the connection
    times: int
    headers: dict[str, str]
    after_bytes: int | None  # send so much of the true answer, then drop
    skip: int  # let so many requests pass first
    hold: threading.Event | None  # wait for it before failing


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Route = Callable[["Handler", dict[str, str]], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the request log takes its place

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        self.request_headers = {name.lower(): value for name, value in self.headers.items()}
        self.body = self._read_body()
        fault = self.hub.take_fault(self.command, self.path)
        if fault is not None and fault.hold is not None:
            fault.hold.wait()
        if fault is not None and fault.status is None and fault.after_bytes is None:
            self._log(None)
            self.close_connection = True
            return
        if fault is not None and fault.status is not None:
            answer = as_answer(Refusal(fault.status, "Ordered failure", headers=fault.headers))
        else:
            answer = self._answer()
        self._log(answer.status)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.after_bytes is not None:
            self.wfile.write(answer.body[: fault.after_bytes])
            self.close_connection = True
            return
        self.wfile.write(answer.body)

    def _answer(self) -> Answer:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            match = pattern.fullmatch(url.path) if wanted == method else None
            if match:
                parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
                new_id = self.hub.moved.get(parts.get("id", ""))
                if new_id is not None:
                    return Answer(status=307, headers={"Location": self.path.replace(parts["id"], new_id, 1)})
                try:
                    with self.hub.lock:
                        return function(self, parts)
                except Refusal as refusal:
                    return as_answer(refusal)
        return Answer(b'{"error":"Sorry, we can\'t find the page you are looking for."}', 404)

    def _read_body(self) -> bytes:
        if self.request_headers.get("transfer-encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.request_headers.get("content-length", 0)))

    def _log(self, status: int | None) -> None:
        with self.hub.lock:
            self.hub.requests.append(LoggedRequest(self.command, self.path, self.request_headers, self.body, status))

    @property
    def user(self) -> User | None:
        return self.hub.user_of(self.request_headers)


def as_answer(refusal: Refusal) -> Answer:
    return Answer(json.dumps({"error": refusal.message}).encode(), refusal.status, refusal.headers)


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})
