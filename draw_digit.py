"""The server of draw_digit.html, the page on which digits are drawn.

GET / returns the page. POST / takes a picture and returns, as JSON, what the page shows for it.
"""

import contextlib
import json
import threading
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from utils import ScriptError, describe_error

# The page may load nothing from other sites, and no other site may show it
POLICY = "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'"


def serve_page(read: Callable[[bytes], dict], port: int) -> None:
    """Serve the page until Ctrl-C, and open it in the browser.

    `read` takes a picture file's content and returns a dict as predict_digits.read_digits does, of
    which the page shows `text`, `message` and `digits`. Each may be missing, and `message` tells
    the error if `read` raises one. Port 0 is one that is free. Raises ScriptError if the port
    cannot be used.
    """
    try:
        server = PageServer(read, port)
    except OSError as error:
        raise ScriptError(
            f"cannot use port {port}: {error.strerror}; leave out --port or name another"
        ) from error
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"Draw digits at {address} (Ctrl-C ends the server)", flush=True)
    # In a thread of its own, because a browser in the terminal returns only when it is closed
    threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    server.serve_forever()


class PageServer(ThreadingHTTPServer):
    """A server that only this computer can reach."""

    def __init__(self, read: Callable[[bytes], dict], port: int) -> None:
        super().__init__(("127.0.0.1", port), PageRequest)
        self.page = Path(__file__).with_name("draw_digit.html").read_bytes()
        self.read = read
        # One thread, because a model may hold state, and torch starts helpers for each caller
        self.reader = ThreadPoolExecutor(1)

    def answer(self, picture: bytes) -> bytes:
        """Return what the page shows for a picture, as JSON."""
        try:
            shown = self.reader.submit(self.read, picture).result()
        except Exception as error:  # whatever the picture or a user's model causes
            shown = {"message": describe_error(error)}
        return json.dumps(shown, default=lambda values: values.tolist()).encode()


class PageRequest(BaseHTTPRequestHandler):
    """One connection of a browser; http.server calls the methods."""

    timeout = 10  # seconds without a byte, after which the connection is closed
    server: PageServer

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the browser may go away at any time
            super().handle()

    def parse_request(self) -> bool:
        """Read the request's head, and refuse what does not come from the page.

        Any site that is open in the same browser can send requests to this address. Their Origin
        is foreign, or their Host if the site's name was made to point to this computer.
        """
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        is_own_host = host.split(":")[0] in ("127.0.0.1", "localhost")
        is_own_origin = self.headers.get("Origin") in (None, f"http://{host}")
        if not (is_own_host and is_own_origin):
            self.send_error(HTTPStatus.FORBIDDEN)
            return False
        if self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return False
        return True

    def do_GET(self) -> None:
        self.send("text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        """Answer a picture of less than a megabyte."""
        length = self.headers.get("Content-Length")
        if not length:
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
        elif not length.isdecimal():
            self.send_error(HTTPStatus.BAD_REQUEST)
        elif len(length) > 6:  # a megabyte or more
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            picture = self.rfile.read(int(length))
            if len(picture) < int(length):
                self.send_error(HTTPStatus.BAD_REQUEST)
            else:
                self.send("application/json", self.server.answer(picture))

    def send(self, media_type: str, data: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print no line for each request."""
