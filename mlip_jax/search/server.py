"""The local web page: Python's own HTTP server, for the browsers of this machine alone."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rich.console import Console

from mlip_jax.core.errors import UserError
from mlip_jax.inference import Model
from mlip_jax.search.answers import Answer, Answers, Refusal
from mlip_jax.search.collection import Collection
from mlip_jax.search.index import Index

HOST = "127.0.0.1"
MOST_BYTES = 64 * 2**20  # of an image to search by
_PATIENCE = 30  # seconds that a connection may be silent
_LATEST = 120  # seconds that an image may take to come
_PIECE = 2**20
_MOST_CONNECTIONS = 64  # a thread each; browsers open six
_MOST_BODIES = 2  # images to search by that are in memory at a time
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; "
    "style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(
    index: Index, collection: Collection, model: Model, port: int, top: int, console: Console
) -> None:
    """Serves the page until Ctrl-C.

    Raises:
      UserError: when the port is taken or not ours to take.
    """
    with make_server(Answers(index, collection, model, top), port) as server:
        console.print(f"http://{HOST}:{server.server_port} shows {index.folder}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print()


def make_server(answers: Answers, port: int) -> ThreadingHTTPServer:
    """A server of the page that listens and does not answer yet; port 0: any that is free.

    Raises:
      UserError: as `serve`.
    """
    try:
        return _Server((HOST, port), functools.partial(_Handler, answers))
    except OSError as error:
        raise UserError(
            f"cannot listen at {HOST}:{port}: {error.strerror}; give another --serve=PORT, or "
            "--serve=0 for any that is free"
        ) from error


class _Server(ThreadingHTTPServer):
    """Answers a limited number of connections at a time, and holds as few images of requests."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._connections = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._bodies = threading.BoundedSemaphore(_MOST_BODIES)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    @contextlib.contextmanager
    def room_for_body(self) -> Iterator[None]:
        """Where the image of a request may be read: before it is, others have to be done with.

        Raises:
          Refusal: when they take too long.
        """
        if not self._bodies.acquire(timeout=_PATIENCE):
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "other images are searched for: later")
        try:
            yield
        finally:
            self._bodies.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Browsers hang up whenever they need an image no more.
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers requests of our own page, and of no other site's."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "mlip_jax", ""
    timeout = _PATIENCE
    server: _Server

    def __init__(self, answers: Answers, *arguments: Any) -> None:
        self._answers = answers
        super().__init__(*arguments)

    def do_GET(self) -> None:
        try:
            url = self._url()
            self._check_site(anyone=url.path == "/")
            if url.path == "/":
                self._send_page()
            else:
                self._send(self._answers.get(url.path, _values(url.query)))
        except Refusal as refusal:
            self._refuse(refusal)

    def do_POST(self) -> None:
        try:
            url = self._url()
            self._check_site()
            if url.path != "/search":
                raise Refusal(HTTPStatus.NOT_FOUND, "there is no such page")
            with self.server.room_for_body():
                self._send(self._answers.search_like(self._body(), _values(url.query)))
        except Refusal as refusal:
            # What was not read of the body would be taken for the next request.
            self.close_connection = True
            self._refuse(refusal)

    def _url(self) -> urllib.parse.SplitResult:
        try:
            return urllib.parse.urlsplit(self.path)
        except ValueError as error:  # such as "http://[": the beginning of an address in IPv6
            raise Refusal(HTTPStatus.BAD_REQUEST, "this is no address") from error

    def _check_site(self, anyone: bool = False) -> None:
        """Refuses other sites' requests, and those for a name that only leads to this machine.

        A site that has its own name resolve to 127.0.0.1 (DNS rebinding) sends that name as Host.
        """
        port = self.server.server_port
        hosts = [f"{name}:{port}" for name in (HOST, "localhost")]
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site", "none")
        if host.lower() not in hosts:
            raise Refusal(HTTPStatus.FORBIDDEN, f"this page is http://{hosts[0]} alone")
        if origin is not None and origin not in [f"http://{allowed}" for allowed in hosts]:
            raise Refusal(HTTPStatus.FORBIDDEN, "requests of other sites are not answered")
        if site not in ("none", "same-origin") and not anyone:
            raise Refusal(HTTPStatus.FORBIDDEN, "requests of other sites are not answered")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "how long is the image?")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"an image of more than {MOST_BYTES >> 20} MB is not read",
            )
        # Piece by piece: each may be late by `timeout` alone, and all together by `_LATEST`.
        left, latest, pieces = int(length), time.monotonic() + _LATEST, []
        while left:
            piece = self.rfile.read1(min(left, _PIECE))
            if not piece or time.monotonic() > latest:
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the image did not come as a whole")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
        content = page.replace("{{ nonce }}", nonce).encode()
        self._send(Answer(HTTPStatus.OK, "text/html; charset=utf-8", content), nonce)

    def _send(self, answer: Answer, nonce: str = "") -> None:
        self.send_response(answer.status)
        if answer.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.content)))
        self.send_header("Cache-Control", "no-store")  # rows are other images after an update
        self.send_header("Content-Security-Policy", _POLICY.format(nonce=nonce or "none"))
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.content)

    def _refuse(self, refusal: Refusal) -> None:
        content = json.dumps({"error": str(refusal)}).encode()
        self._send(Answer(refusal.status, "application/json", content))

    def log_message(self, *arguments: Any) -> None:
        """Says nothing: a page of thumbnails is a hundred requests."""


def _values(query: str) -> dict[str, str]:
    try:
        return dict(urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=8))
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "too many values") from error
