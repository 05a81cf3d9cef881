"""The leader's HTTP API, as the commands of `vllm-spark` ask it, and the sentences of their errors."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from vllm_spark.errors import EXIT_LOST, ConfigurationError, SparkError, without_stop

DEFAULT_URL = "http://localhost:8000"
KEY_VARIABLE = "VLLM_API_KEY"
_SECONDS = 10.0
_LARGEST = 1 << 20  # bytes of an answer
_LONGEST_MESSAGE = 400  # characters of a server's own sentence


class NoAnswerError(SparkError):
    """No pair answered."""

    exit_code = EXIT_LOST


class StatusError(SparkError):
    """The server answered with a status of an error.

    Attributes:
        status: of HTTP.
    """

    exit_code = EXIT_LOST

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class LeaderApi:
    """The HTTP API at one URL.

    Args:
        url: as `checked_url` returns it.
        key: the API key; by default that of the variable KEY_VARIABLE.

    Attributes:
        url: as given.
        key: the API key; empty without one.

    Raises:
        ConfigurationError: no HTTP header can contain the key.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self.key = _checked_key(key or os.environ.get(KEY_VARIABLE, ""))

    def ask(self, path: str, body: Any = None, *, seconds: float = _SECONDS, largest: int = _LARGEST) -> bytes:
        """The answer to a GET, or with a `body`, which is sent as JSON, to a POST.

        Raises:
            NoAnswerError: no server answers, it requires another key, or it sends nothing for `seconds`.
            StatusError: it answered with an error.
        """
        with self.stream(path, body, seconds=seconds) as response, self._explained():
            content: bytes = response.read(largest)
            return content

    @contextlib.contextmanager
    def stream(self, path: str, body: Any = None, *, seconds: float) -> Iterator[Any]:
        """The response to `ask`, to be read piece by piece; errors are the same."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        with self._explained():
            # Proxies are not asked: the leader is one of two machines on a desk.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            response = opener.open(request, timeout=seconds)
        with response:
            yield response

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                sentence = _message_of(error)
            if error.code == 401:
                raise NoAnswerError(
                    f"{self.url} requires another API key; give it with --api-key or in the variable {KEY_VARIABLE}"
                ) from None
            raise StatusError(sentence, error.code) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            text = without_stop(str(getattr(reason, "strerror", None) or reason)).lower()
            raise NoAnswerError(
                f"no server answers at {self.url} ({text}); start vllm serve with --spark, or give its address with "
                "--url"
            ) from None


def checked_url(url: str) -> str:
    """The URL without a path that clients of the API may have.

    Raises:
        ConfigurationError: it is not one of HTTP, or has more than host, port and path.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(full)
        (parts.hostname or "").encode("idna")  # as for the name's look-up
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or "@" in parts.netloc or parts.query or parts.fragment or not _fits_a_path(parts.path):
        raise ConfigurationError(f"--url {url} is invalid: must be as {DEFAULT_URL}")
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


def _checked_key(key: str) -> str:
    """The API key.

    Raises:
        ConfigurationError: no HTTP header can contain it.
    """
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(
            f"the API key of --api-key or {KEY_VARIABLE} is invalid: must consist of printable ASCII characters"
        )
    return key


def _fits_a_path(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _message_of(error: urllib.error.HTTPError) -> str:
    """The sentence in an answer with an error, as vLLM and this project send it."""
    try:
        text = error.read(_LARGEST).decode(errors="replace")
    except (OSError, HTTPException):
        text = ""
    try:
        content = json.loads(text)
        text = str(content["error"]["message"] if "error" in content else content["detail"])
    except (ValueError, KeyError, TypeError):
        pass
    text = " ".join(text.split())
    return f"HTTP status {error.code}" + (f": {text[:_LONGEST_MESSAGE]}" if text else "")
