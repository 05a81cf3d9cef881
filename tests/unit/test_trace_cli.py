"""`vllm-spark trace` against a server that stands for the leader's: the whole command, and each of its errors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.backend.pair_status import report as status
from vllm_spark.cli import main
from vllm_spark.errors import EXIT_LOST, EXIT_USAGE, EXIT_WARNINGS
from vllm_spark.processes.local import free_ports
from vllm_spark.recording.records import PATH, TraceAnswer
from vllm_spark.records import to_json

from .test_pair_status import REPORT
from .trace_pair import pair_recording, recording


class Leader(BaseHTTPRequestHandler):
    """Answers as `answers` says, by path, and streams tokens."""

    answers: dict[str, tuple[int, bytes]]
    posted: list[tuple[str, Any]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(*self.answers.get(self.path, (404, b"")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.posted.append((self.path, body))
        if self.path == PATH:
            self._answer(*self.answers.get(body["action"], (404, b'{"detail": "Not Found"}')))
        elif "completions" in self.answers:
            self._answer(*self.answers["completions"])
        else:
            pieces = b"".join(b'data: {"choices": []}\n\n' for _ in range(body["max_tokens"]))
            self._answer(200, pieces + b"data: [DONE]\n\n")

    def _answer(self, code: int, content: bytes) -> None:
        if self.headers.get("Authorization") != "Bearer sesame":
            code, content = 401, b'{"error": "Unauthorized"}'
        if content == b"hang":
            time.sleep(3)
            content = b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


STARTED = (200, to_json(TraceAnswer()))
ANSWERS = {
    status.PATH: (200, to_json(REPORT)),
    "/v1/models": (200, b'{"data": [{"id": "tiny"}]}'),
    "start": STARTED,
    "collect": (200, to_json(TraceAnswer(pair_recording()))),
}


@contextmanager
def server(**changes: tuple[int, bytes] | None) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The URL, and what was posted there. An answer None is none."""
    answers = {name: answer for name, answer in {**ANSWERS, **changes}.items() if answer is not None}
    posted: list[tuple[str, Any]] = []
    handler = type("Handler", (Leader,), {"answers": answers, "posted": posted})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", posted
        finally:
            http.shutdown()
            thread.join(20)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The current one, and the key in its variable."""
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trace(url: str, *options: str) -> int:
    return main(["trace", "--url", url, *options])


def test_the_whole_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (url, posted):
        assert trace(url, "--steps", "11", "--image", "step.png", "--batch", "2", "--prompt-tokens", "5") == 0
    assert [(path, body.get("action")) for path, body in posted] == [
        (PATH, "start"),
        ("/v1/completions", None),
        ("/v1/completions", None),
        (PATH, "collect"),
    ]
    assert posted[0][1] == {"action": "start", "steps": 11, "sequences": 2, "seconds": 120.0}
    first, second = (body for path, body in posted if path != PATH)
    assert len(first["prompt"]) == 5
    assert first["prompt"] != second["prompt"]
    printed = capsys.readouterr()
    assert "100.0% of the measured step" in printed.out
    assert "Written: trace.json, step.png" in printed.out
    assert json.loads((folder / "trace.json").read_text())["otherData"]["model"] == "tiny"
    assert (folder / "step.png").exists()


def test_parts_that_do_not_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    gaps = (200, to_json(TraceAnswer(pair_recording(unexplained=100_000))))
    with server(collect=gaps) as (url, _):
        assert trace(url) == EXIT_WARNINGS
    assert "DIFFER by more than 3%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({status.PATH: None}, "has no status of a pair (HTTP status 404); give with --url the address of vllm serve"),
        (
            {status.PATH: (200, to_json(replace(REPORT, facts=None, failure="the cable is out")))},
            "serves no pair now, its engine has failed: the cable is out",
        ),
        (
            {"start": None},
            "takes no traces (HTTP status 404: Not Found); use the version of vllm-spark that serves there",
        ),
        ({"start": (503, b"the engine has failed: x")}, "takes no traces (HTTP status 503: the engine has failed: x)"),
        (
            {"start": (200, to_json(TraceAnswer(refusal="this server does not permit traces")))},
            "records nothing: this server does not permit traces",
        ),
        ({"start": (200, b"<html>")}, "is not a trace ("),
        (
            {"completions": (400, b'{"error": {"message": "the context is too short"}}')},
            "does not complete the prompts of the trace: HTTP status 400: the context is too short",
        ),
        (
            {"collect": (200, to_json(TraceAnswer(replace(pair_recording(), ranks=[recording(0, steps=[])] * 2))))},
            "ran no decode step in 120 s; give more --seconds",
        ),
        ({"collect": STARTED}, "has sent no recording"),
        ({"/v1/models": (200, b"{}")}, "does not name its model"),
    ],
)
def test_an_error_is_one_sentence(
    changes: dict[str, tuple[int, bytes] | None], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(**changes) as (url, _):
        assert trace(url) == EXIT_LOST
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_a_request_that_fails_ends_the_recording() -> None:
    with server(completions=(400, b"")) as (url, posted):
        assert trace(url) == EXIT_LOST
    assert posted[-1][1]["action"] == "collect"


def test_requests_that_take_too_long() -> None:
    """What was recorded until then is shown."""
    with server(completions=(200, b"hang")) as (url, _):
        began = time.monotonic()
        assert trace(url, "--seconds", "0.5") == 0
        assert time.monotonic() - began < 30


def test_another_key(capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (url, posted):
        assert trace(url, "--api-key", "other") == EXIT_LOST
    assert capsys.readouterr().err == (
        f"vllm-spark: {url} requires another API key; give it with --api-key or in the variable VLLM_API_KEY.\n"
    )
    assert posted == []


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert trace(f"http://127.0.0.1:{port}") == EXIT_LOST
    assert "no server answers at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "/proc/none/trace.json"], "/proc/none/trace.json cannot be written: /proc/none is not a writable"),
        (["--out", "."], "cannot be written: it is a folder"),
        (["--image", "/proc/none/step.png"], "/proc/none/step.png cannot be written"),
        (["--image", "step.gif"], "--image step.gif must end in .png, .svg, .pdf"),
        (["--url", "ftp://desk1"], "--url ftp://desk1 is invalid"),
        (["--steps", "0"], "'0' is not a number above 0 and at most 1000"),
        (["--steps", "1001"], "'1001' is not a number above 0 and at most 1000"),
        (["--batch", "x"], "'x' is not a number above 0"),
        (["--prompt-tokens", "-3"], "is not a number above 0"),
        (["--seconds", "nan"], "'nan' is not a number above 0"),
    ],
)
def test_wrong_usage_asks_no_server(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as (url, posted):
        assert main(["trace", "--url", url, *options]) == EXIT_USAGE
    assert sentence in capsys.readouterr().err
    assert posted == []
