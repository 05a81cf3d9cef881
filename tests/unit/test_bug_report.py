"""`vllm-spark report`: what is in it, and that no secret is, wherever one was."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, quote_plus

import pytest

from vllm_spark.bug_report.redaction import SECRET, Redaction, shown_variable
from vllm_spark.processes.managed import clean_environment, program

OF_THE_PAIR, SPACED, OF_A_FILE = "the pair's secret", "the secret's variable", "token's file"
PLANTED = {
    "the pair's secret": "pair-secret-0123456789abcdef",
    "the secret's variable": "variable secret with spaces/&+",
    "API key": "key-of-the-server-4711",
    "key on the command line": "key-on-the-command-line-0815",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "token's file": "hf_TokenOfTheFile0123456789",
    "another token": "hf_NobodySetThisOne9876543210",
    "cloud": "AKIAIOSFODNN7EXAMPLE1",
    "a variable": "wandb-value-1234567890",
    "password in a URL": "pa55-in-the-url",
    "bearer": "bearer-value-abcdef",
    "key of a log": "log-key-value-42",
    "key in JSON": "json-key-value-43",
    "web token": "eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl",
    "PEM": "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC",
    "user": "katharina",
    "public address": "203.0.114.77",
}


def log_lines(home: Path) -> str:
    """A log in which each secret is, as programs write them."""
    return "\n".join(
        [
            "INFO a line that stays: max_tokens=512, tokens per second 42, token_digest=abcdef0123, key_blocks=7",
            f"INFO --api-key {PLANTED['key of a log']} --port 8000",
            f'{{"api_key": "{PLANTED["key in JSON"]}", "n": 1}}',
            f"args: secret={PLANTED[OF_THE_PAIR]!r}",
            f"Authorization: Bearer {PLANTED['bearer']}",
            f"downloading https://somebody:{PLANTED['password in a URL']}@hub.example/model",
            f"tokens {PLANTED['another token']} {PLANTED['cloud']} {PLANTED['web token']}",
            f"-----BEGIN PRIVATE KEY-----\n{PLANTED['PEM']}\n-----END PRIVATE KEY-----",
            f"loading {home}/models/tiny, as /home/{PLANTED['user']}/x and /Users/{PLANTED['user']}/y",
            f"from {PLANTED['public address']} and 10.0.0.1",
            f"quoted {quote(PLANTED[SPACED], safe='')} {quote(PLANTED[SPACED])} {quote_plus(PLANTED[SPACED])}",
        ]
    )


class _Status(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f'{{"clients": "http://user:{PLANTED["password in a URL"]}@localhost", "served": "tiny"}}'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def status_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Status)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def spark(home: Path, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "COLUMNS": "80"}
    environment.pop("HF_HOME", None)
    return subprocess.run(
        [program("vllm-spark"), "report", *argv],
        env=environment | more,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user whose files have secrets."""
    folder = tmp_path / PLANTED["user"]
    for path, text in (
        (".config/vllm-spark/secret", PLANTED["the pair's secret"]),
        (".cache/huggingface/token", PLANTED["token's file"] + "\n"),
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
        (folder / path).chmod(0o600)
    (folder / "serve.log").write_text(log_lines(folder) + f"\ntoken {PLANTED[OF_A_FILE]}\n")
    return folder


def test_no_secret_is_in_the_report(home: Path) -> None:
    with status_server() as address:
        done = spark(
            home,
            "report.txt",
            *("--log", "serve.log", "--log", f"{home}/absent.log", "--api-key", PLANTED["key on the command line"]),
            *("--url", f"http://{address}"),
            HF_TOKEN=PLANTED["HF_TOKEN"],
            VLLM_API_KEY=PLANTED["API key"],
            VLLMSPARK_SECRET=PLANTED["the secret's variable"],
            WANDB_API_KEY=PLANTED["a variable"],
            VLLM_LOGGING_PREFIX=f"echo {PLANTED['a variable']}",
            HF_ENDPOINT=f"https://me:{PLANTED['password in a URL']}@hub.example",
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    path = home / "report.txt"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    for where, secret in PLANTED.items():
        assert secret not in text, where
        if where != "user":  # whose folder the printed path is in
            assert secret not in done.stdout, where
    assert "secret%20with" not in text
    assert "secret+with" not in text
    for part in (
        "===== versions =====",
        "===== vllm-spark doctor =====",
        "===== changes to vLLM =====",
        "===== log serve.log =====",
        "===== log ~/absent.log =====\nit is not a file",
        "Shared secret",
        "max_tokens=512, tokens per second 42, token_digest=abcdef0123, key_blocks=7",
        "loading ~/models/tiny, as /home/(user)/x and /Users/(user)/y",
        f"--api-key {SECRET} --port 8000",
        "from (public address) and 10.0.0.1",
        f"HF_TOKEN={SECRET}",
        f"https://{SECRET}@hub.example",
    ):
        assert part in text, part
    assert f"Wrote {path}, which only you may read:" in done.stdout
    assert "  log serve.log: 12 lines" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if str(home) not in line) <= 80


def test_nothing_is_overwritten(home: Path) -> None:
    (home / "report.txt").write_text("mine")
    (home / "link.txt").symlink_to(home / "elsewhere")
    for name in ("report.txt", "link.txt"):
        done = spark(home, name)
        assert done.returncode == 2
        assert f"{name} exists already, and is not overwritten; give another file" in done.stderr
    assert (home / "report.txt").read_text() == "mine"
    assert not (home / "elsewhere").exists()


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    done = spark(home, "absent/report.txt")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_that_are_wrong_are_reported(home: Path) -> None:
    done = spark(home, VLLMSPARK_PORT="many")
    assert done.returncode == 0, done.stderr
    (path,) = home.glob("vllm-spark-report-*.txt")
    assert "the settings cannot be read: VLLMSPARK_PORT" in path.read_text()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("secret: abc", f"secret: {SECRET}"),
        ("Shared secret: none", "Shared secret: none"),
        ("postgres://me:x@y@host/db", f"postgres://{SECRET}@host/db"),
        ("mail me@host.example", "mail me@host.example"),
        ("http://10.0.0.1:8000/v1", "http://10.0.0.1:8000/v1"),
        ("tokens: 12, max_tokens: 5", "tokens: 12, max_tokens: 5"),
        ("/home/me2/models", "/home/(user)/models"),
        ("/home/me", "~"),
        ("a long-one, also with long", f"a {SECRET}, also with {SECRET}"),
    ],
)
def test_what_is_replaced(text: str, left: str) -> None:
    assert Redaction(["long", "long-one", "abc"], "/home/me").apply(text) == left


def test_variables() -> None:
    assert shown_variable("MY_ACCESS_TOKEN", "x") == f"MY_ACCESS_TOKEN={SECRET}"
    assert shown_variable("NCCL_DEBUG", "INFO") == "NCCL_DEBUG=INFO"
    assert shown_variable("EMPTY_TOKEN", "") == "EMPTY_TOKEN="
