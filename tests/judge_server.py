"""A server on loopback that speaks OpenAI's chat completions and can be told to misbehave, and what it judges.

`truth` is what it says of a case when it answers; `answered` counts the complete verdicts it sent, by case.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUICK = {"retry-after-ms": "5"}
LINE = re.compile(r"^(Question|Correct answer|Predicted answer): (.*)$", re.M)


def truth(case: tuple[str, str, str]) -> tuple[str, int]:
    """(pred, score) that follows from the texts and looks like chance."""
    score = hashlib.sha256("|".join(case).encode()).digest()[0] % 6
    return ("yes" if score > 3 else "no"), score


def write_predictions(path, count: int, start: int = 0) -> list[tuple[str, str, str]]:
    """Predictions that no rule decides."""
    cases = [
        (f"what happens in part {n}?", f"walrus {n} sneezes", f"some animal, part {n}") for n in range(start, count)
    ]
    rows = [
        {
            "question_id": f"q{n}",
            "video_id": f"v{n // 4}",
            **dict(zip(("question", "answer", "prediction"), c, strict=True)),
        }
        for n, c in enumerate(cases, start)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cases


class JudgeServer:
    """Use as a context manager.

    Args:
        behave: (number of the request, case) -> "ok" or the name of a misdeed, see `_Handler`.
    """

    def __init__(self, behave: Callable[[int, tuple], str] = lambda number, case: "ok"):
        self.behave = behave
        self.answered: Counter = Counter()
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        self.open = threading.Event()  # "wait" answers when this is set
        server = self

        class Handler(_Handler):
            home = server

        self._http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.open.set()
        self._http.shutdown()
        self._http.server_close()

    def count(self, by: int) -> None:
        with self.lock:
            self._at_once += by
            self.most_at_once = max(self.most_at_once, self._at_once)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients hang up, or are killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    home: JudgeServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        self.home.count(1)
        try:
            self._post()
        finally:
            self.home.count(-1)

    def _post(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        case = tuple(json.loads(text) for _, text in LINE.findall(request["messages"][-1]["content"]))
        with self.home.lock:
            number = len(self.home.requests)
            self.home.requests.append({"path": self.path, **request})
            self.home.headers.append({name.lower(): value for name, value in self.headers.items()})
            deed = self.home.behave(number, case)
        pred, score = truth(case)
        verdict = json.dumps({"pred": pred, "score": score})
        if deed.isdigit():
            said = f"half \ud83d, wrong key sk-loop****cdef: {self.headers['Authorization']}"
            error = {"error": {"message": said, "code": None}}
            return self._send(int(deed), error, QUICK)
        if deed == "slow down":
            return self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.6"})
        if deed == "content_filter":
            return self._send(400, {"error": {"message": "filtered", "code": "content_filter"}})
        if deed == "stall":  # until the client gives up
            self.connection.settimeout(20)
            try:
                self.connection.recv(1)
            except OSError:
                pass
            self.close_connection = True
            return None
        if deed == "drip":  # a byte now and then, as servers do that keep a connection open
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.2)
            except OSError:
                pass
            self.close_connection = True
            return None
        if deed == "wait":
            self.home.open.wait(60)
        if deed == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        text = {
            "prose": f"Sure! Here is my verdict: {verdict} I hope this helps.",
            "fence": f"```json\n{verdict}\n```",
            "half json": verdict[:-5],
            "empty": "",
            "half character": verdict + "\ud83d",
            "brackets": "[" * 100_000,
            "wrong keys": json.dumps({"pred": pred}),
            "wrong range": json.dumps({"pred": pred, "score": 7}),
        }.get(deed, verdict)
        message = {"role": "assistant", "content": text, "refusal": None}
        if deed == "refusal":
            message |= {"content": None, "refusal": "I would rather not."}
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge-1-2026-11-01",
            "system_fingerprint": "fp_1",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        if deed == "half name":
            body["model"] += "\ud83d"
        if deed == "no choices":
            body["choices"] = []
        return self._send(200, body, cut=deed in ("cut", "half body"), close=deed == "half body", case=case)

    def _send(self, status, body, headers=None, *, cut=False, close=False, case=None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if close:  # the end of the connection is the end of the body: half of it looks complete
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        if cut:
            self.close_connection = True
        elif case is not None:
            with self.home.lock:
                self.home.answered[case] += 1
