"""A small server that speaks OpenAI's chat protocol over HTTP, in a process of its own, and misbehaves on request.

Its answer tells what it was shown, so that a test can see that the pictures arrived: `2 pictures, 40x30, (200, 30, 30)`
are the number of pictures and width, height and middle pixel of the first.

    python -m tests.support.chat_server '{"first": ["500", "drop"], "always": {"61": "400"}, "seconds": 0.1}'

`first`: faults of the first attempt at the first, second ... different question; `always`: width of a question's first
picture -> fault of every attempt; `seconds`: how long an answer takes. The port is its first line of output, and every
request a line of JSON.
"""

import base64
import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

MODEL = "captioner"


class Asked:
    """A running server, as a test sees it."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def requests(self) -> list[dict]:
        """Every request so far: what was shown, and what it got."""
        lines = self._log.read_text().splitlines()[1:]
        return [json.loads(line) for line in lines]


@contextlib.contextmanager
def chat_server(folder: Path, **behaviour: object) -> Iterator[Asked]:
    """A server for the time of the context; `folder` takes its log."""
    log = folder / f"chat_server_{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.support.chat_server", json.dumps(behaviour)]
        process = subprocess.Popen(command, stdout=output, cwd=Path(__file__).parents[2])
    try:
        while not (port := log.read_text().partition("\n")[0]):
            assert process.poll() is None, "the server did not start"
            time.sleep(0.02)
        yield Asked(f"http://127.0.0.1:{port}/v1", log)
    finally:
        process.kill()
        process.wait()


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    seen: dict[str, str] = {}
    behaviour: dict = {}

    def log_message(self, *_: object) -> None:
        """Requests are logged as JSON instead."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
        width, height = pictures[0].size
        fault = self.behaviour.get("always", {}).get(str(width)) or self.first_fault(json.dumps(content))
        if body["model"] != MODEL:
            fault = "404"
        line = {"pictures": len(pictures), "width": width, "fault": fault, "prompt": content[-1]["text"]}
        with self.lock:
            print(json.dumps(line), flush=True)
        time.sleep(self.behaviour.get("seconds", 0))
        pixel = pictures[0].getpixel((width // 2, height // 2))
        text = f"{len(pictures)} pictures, {width}x{height}, {pixel}"
        if fault.isdigit():
            self.fail(int(fault))
        else:
            getattr(self, f"do_{fault or 'answer'}")(text)

    def first_fault(self, question: str) -> str:
        """The fault of this attempt: that of the question's place in `first`, once."""
        with self.lock:
            if question in self.seen:
                return ""
            self.seen[question] = ""
            return dict(enumerate(self.behaviour.get("first", []))).get(len(self.seen) - 1, "")

    def fail(self, status: int) -> None:
        headers = {"Retry-After": "0.3"} if status == 429 else {}
        self.send(b'{"error": {"message": "on purpose", "type": "test"}}', status=status, **headers)

    def do_answer(self, text: str, finish: str = "stop", refusal: str | None = None) -> None:
        message = {"role": "assistant", "content": text, "refusal": refusal}
        choices = [{"index": 0, "message": message, "finish_reason": finish}]
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": choices,
            "usage": usage,
        }
        self.send(json.dumps(answer).encode())

    def do_empty(self, text: str) -> None:
        self.do_answer("  \n")

    def do_length(self, text: str) -> None:
        self.do_answer(text, finish="length")

    def do_refusal(self, text: str) -> None:
        self.do_answer("", refusal="I will not.")

    def do_surrogate(self, text: str) -> None:
        self.do_answer("\ud800")

    def do_broken(self, text: str) -> None:
        self.send(b'{"id": "1", "choices": [{"mess')

    def do_nothing(self, text: str) -> None:
        self.send(b'{"choices": []}')

    def do_html(self, text: str) -> None:
        self.send(b"<html>gateway</html>", **{"Content-Type": "text/html"})

    def do_drop(self, text: str) -> None:
        self.close_connection = True
        self.connection.close()

    def do_half(self, text: str) -> None:
        self.send(b'{"id"', length=1000)
        self.do_drop(text)

    def do_drip(self, text: str) -> None:
        """A byte now and then: no single read is slow."""
        self.send(b" ", length=1000)
        with contextlib.suppress(OSError):
            for _ in range(100):
                time.sleep(0.1)
                self.wfile.write(b" ")
                self.wfile.flush()

    def send(self, body: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(length or len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


if __name__ == "__main__":
    Handler.behaviour = json.loads(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
