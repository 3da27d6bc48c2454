"""This module is the HTTP side of the W&B server in wandb_server.py: it reads requests and sends the answers."""

from __future__ import annotations

import gzip
import json
import re
import sys
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.wandb_server import WandbServer


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignores a client that closes its connection early."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, answer: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        state, body = self.server_state, self._body()
        if state.answer == "error":
            return self._send({"error": "out of order"}, 500)
        if state.answer == "nothing":
            state.released.wait(60)
            self.close_connection = True
            return None
        if self.path.startswith("/graphql"):
            request = json.loads(body)
            match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            operation = match[1] if match else "Viewer"
            state.requests.append(operation)
            return self._send({"data": state.graphql(operation, request.get("variables") or {})})
        state.requests.append(self.path)
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            state.stream(match[1], json.loads(body))
            return self._send({"limits": {}})
        if self.command == "PUT":
            state.put(self.path, body)
        return self._send({})

    do_GET = do_POST = do_PUT = _handle
