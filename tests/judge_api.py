"""The remote APIs of judges, played over real HTTP on loopback: Gemini's REST and OpenAI's chat completions.

Answers that hold `good` get top grades, all others low ones. A test queues what shall go wrong.
"""

import json
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret-key-4711"
USAGE = (1000, 200)
"""Input and output tokens of every reply."""

FAULTS = (
    "busy", "busy_date", "broken", "slow", "truncated", "wrong_schema", "wrong_count", "blocked_prompt", "blocked",
    "empty", "wrong_key", "cut_body", "page", "come_back_tomorrow",
)  # fmt: skip


class JudgeApi:
    """What the server does and has seen."""

    def __init__(self) -> None:
        self.faults: deque[str] = deque()
        """What goes wrong with the next calls, one each; "" for nothing."""
        self.always = ""
        """What goes wrong with every call."""
        self.delay = 0.0
        self.good = "good"
        """What good answers hold."""
        self.favours_first = False
        """Pairwise: the first answer always wins."""
        self.knows_schemas = True
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""
        self._lock = threading.Lock()

    def enter(self, request: dict[str, Any]) -> str:
        """Note a call; returns its fault."""
        with self._lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return self.faults.popleft() if self.faults else self.always

    def leave(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def verdict(self, text: str) -> dict[str, Any]:
        """The reply to a question whose whole text is given."""
        if "[Answer A]" in text:
            a, b = (re.search(rf"\[Answer {x}\]\n(.*?)\n\[End", text, re.S)[1] for x in "AB")  # type: ignore[index]
            if self.favours_first:
                return {"reason": "first", "verdict": "A"}
            better = (self.good in a) - (self.good in b)
            verdict = "A" if better > 0 else "B" if better < 0 else "tie"
            return {"reason": f"{verdict} is what it is", "verdict": verdict}
        answers = re.findall(r"\[Answer \d+\]\n(.*?)\n\[End of answer \d+\]", text, re.S)
        return {"answers": [grades(answer, self.good in answer) for answer in answers]}


def grades(answer: str, good: bool) -> dict[str, Any]:
    high = 4 if good else 1
    return {
        "reason": f"about {answer}", "helpfulness": high, "correctness": high, "coherence": high, "complexity": 1,
        "verbosity": 2,
    }  # fmt: skip


@contextmanager
def judge_api() -> Iterator[JudgeApi]:
    """A running server."""
    api = JudgeApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet, or the client's delayed acknowledgement adds 40 ms

        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            gemini = "generateContent" in self.path
            key = self.headers.get("x-goog-api-key") or self.headers.get("Authorization", "").removeprefix("Bearer ")
            fault = api.enter({"path": self.path, "body": body, "key": key})
            try:
                time.sleep(api.delay)
                self._answer(fault, body, gemini)
            finally:
                api.leave()

        def _answer(self, fault: str, body: dict[str, Any], gemini: bool) -> None:
            match fault:
                case "busy":
                    headers = {} if gemini else {"Retry-After": "1.2"}
                    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.2s"}]
                    return self._error(429, "quota exceeded", headers, details)
                case "busy_date":
                    return self._error(429, "quota exceeded", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, [])
                case "broken":
                    return self._error(500, "internal", {}, [])
                case "come_back_tomorrow":
                    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7200s"}]
                    return self._error(429, "quota exceeded", {} if gemini else {"Retry-After": "7200"}, details)
                case "wrong_key":
                    return self._error(403, f"API key {api.requests[-1]['key']} not valid", {}, [])
                case "page":
                    return self._send_text(200, "<html>the proxy is sorry</html>", {"Content-Type": "text/html"})
                case "slow":
                    time.sleep(1.5)
            if "response_format" in body and not api.knows_schemas:
                return self._error(400, "response_format is not supported", {}, [])
            verdict = json.dumps(api.verdict(_text(body)))
            if fault == "truncated":
                verdict = verdict[: len(verdict) // 2]
            elif fault == "wrong_schema":
                verdict = verdict.replace('"helpfulness": 4', '"helpfulness": "very"').replace('"verdict"', '"winner"')
                verdict = verdict.replace('"helpfulness": 1', '"helpfulness": 7')
            elif fault == "wrong_count":
                verdict = json.dumps({"answers": [grades("good", True)]})
            body = _gemini(verdict, fault) if gemini else _openai(verdict, fault)
            if fault == "cut_body":
                return self._send_text(200, json.dumps(body)[:-20], {})
            self._send(200, body)
            return None

        def _error(self, code: int, message: str, headers: dict[str, str], details: list[Any]) -> None:
            status = {429: "RESOURCE_EXHAUSTED", 403: "PERMISSION_DENIED"}.get(code, "INTERNAL")
            error = {"code": code, "message": message, "status": status, "details": details}
            self._send(code, {"error": error}, headers)

        def _send(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
            self._send_text(code, json.dumps(body), headers or {})

        def _send_text(self, code: int, text: str, headers: dict[str, str]) -> None:
            content = text.encode()
            try:
                self.send_response(code)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client gave up waiting
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # shutdown waits for a poll
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()


def _text(body: dict[str, Any]) -> str:
    if "contents" in body:
        return "\n".join(part.get("text", "") for content in body["contents"] for part in content["parts"])
    content = body["messages"][-1]["content"]
    return "\n".join(part.get("text", "") for part in content)


def _gemini(verdict: str, fault: str) -> dict[str, Any]:
    usage = {"promptTokenCount": USAGE[0], "candidatesTokenCount": USAGE[1], "totalTokenCount": sum(USAGE)}
    if fault == "blocked_prompt":
        return {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": usage}
    if fault == "empty":
        return {"candidates": [], "usageMetadata": usage}
    finish = {"truncated": "MAX_TOKENS", "blocked": "SAFETY"}.get(fault, "STOP")
    candidate: dict[str, Any] = {"finishReason": finish, "index": 0}
    if fault != "blocked":
        candidate["content"] = {"role": "model", "parts": [{"text": verdict}]}
    return {"candidates": [candidate], "usageMetadata": usage}


def _openai(verdict: str, fault: str) -> dict[str, Any]:
    usage = {"prompt_tokens": USAGE[0], "completion_tokens": USAGE[1], "total_tokens": sum(USAGE)}
    finish = {"truncated": "length", "blocked": "content_filter"}.get(fault, "stop")
    refusal = "I cannot look at this" if fault == "blocked_prompt" else None
    message = {"role": "assistant", "content": None if refusal else verdict, "refusal": refusal}
    choices = [] if fault == "empty" else [{"index": 0, "finish_reason": finish, "message": message}]
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}
