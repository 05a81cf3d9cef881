"""A stand-in for the Hugging Face hub: the few endpoints that downloads of the real huggingface_hub use (HF_ENDPOINT).

It serves folders as repositories, each with one commit, on a loopback address.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A running stand-in.

    Attributes:
        url: for HF_ENDPOINT.
        downloads: `REPOSITORY/FILE` of every file that was fetched.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.downloads: list[str] = []


@contextmanager
def hub_of(repositories: Mapping[str, Path], address: str = "127.0.0.1") -> Iterator[Hub]:
    """Serves each folder as the repository of that name until the context is left."""
    server = ThreadingHTTPServer((address, 0), BaseHTTPRequestHandler)
    hub = Hub(f"http://{address}:{server.server_address[1]}")
    server.RequestHandlerClass = partial(_Handler, dict(repositories), hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def cache_model(model: Path, cache: Path, repository: str, commit: str = COMMIT) -> Path:
    """Puts a model into a hub's cache, as a download does; returns its snapshot's folder."""
    import shutil

    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    shutil.copytree(model, snapshot)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, repositories: dict[str, Path], hub: Hub, *given: Any) -> None:
        self._repositories, self._hub = repositories, hub
        super().__init__(*given)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository, what, rest = "/".join(parts[:2]), parts[2:3], parts[4:]
        folder = self._repositories.get(repository)
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, with_body)
        elif is_api and what == ["tree"]:
            self._send_json([_entry(folder, path) for path in _files(folder)], with_body)
        elif is_api:
            names = [{"rfilename": str(path.relative_to(folder))} for path in _files(folder)]
            self._send_json({"id": repository, "sha": COMMIT, "siblings": names, "private": False}, with_body)
        elif what == ["resolve"] and (file := folder / "/".join(rest)).is_file():
            content = file.read_bytes()
            if with_body:
                self._hub.downloads.append(f"{repository}/{'/'.join(rest)}")
            self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'}, with_body)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)

    def _send_json(self, value: Any, with_body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the tests' output."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "type": "file",
        "path": str(path.relative_to(folder)),
        "size": len(content),
        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
