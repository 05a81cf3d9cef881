"""Removes from a text what must not leave this machine: secrets, credentials, home folders, public addresses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

from vllm_spark.config.settings import SECRET_VARIABLE, SparkConfig
from vllm_spark.executor.channel.secret import default_secret_file
from vllm_spark.files import SMALL_FILE, read_regular
from vllm_spark.first_run.report import redacted as without_public_addresses
from vllm_spark.variables import old_name

SECRET = "(secret)"

_SENSITIVE = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
"""Matches names of variables and options whose values are secrets."""

_SHORTEST = 4
"""Characters of a value that is replaced wherever it occurs: shorter ones would be found in other words."""

_VALUE = r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;}\])&]+)"
_NAMED = (
    r"(?:api[_-]?key|(?<!max[_-])(?<![a-z])(?:\w+[_-])?token|(?<!Shared )secret|passw(?:or)?d|passphrase|credentials?)"
)
_ASSIGNED = r"[\"']?(?:\s*[:=]\s*|(?<=[_-]key)\s+|(?<=token)[ ](?=[\"']?\w{12})|(?<=password)[ ])"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [^-]*-----.*?-----END [^-]*-----", re.DOTALL), SECRET),
    # https://user:password@host: everything up to the last @ before the path.
    (re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)[^/\s\"']*@"), rf"\1{SECRET}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{4,}", re.IGNORECASE), rf"\1 {SECRET}"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}"), SECRET),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"), SECRET),
    # --api-key VALUE, api_key=VALUE, "token": "VALUE": names that end so, and neither max_tokens=5 nor the doctor's
    # finding about the shared secret.
    (re.compile(rf"(?i)({_NAMED}{_ASSIGNED}){_VALUE}"), rf"\g<1>{SECRET}"),
)
_HOMES = re.compile(r"/(home|Users)/[^/\s:;,'\"()]+")


class Redaction:
    """What is removed: values that are known to be secret here, and patterns of those of others.

    Args:
        secrets: known values.
        home: of this user; empty if there is none.
    """

    def __init__(self, secrets: Iterable[str], home: str) -> None:
        found = {secret for given in secrets for secret in (given, given.strip()) if len(secret) >= _SHORTEST}
        forms = {form for secret in found for form in _written(secret)}
        self._forms = sorted(forms, key=len, reverse=True)  # one may be a part of another
        self._home = home if len(home) > 1 else ""

    @classmethod
    def of_this_user(cls, config: SparkConfig, given: Iterable[str] = ()) -> Redaction:
        """What must not leave the machine of this user.

        Args:
            config: the settings, which may name the file of the secret.
            given: further secrets, such as a key on the command line.
        """
        return cls([*given, *_of_variables(os.environ), *_of_files(config)], os.path.expanduser("~"))

    def apply(self, text: str) -> str:
        """The text without secrets, home folders and public addresses."""
        for form in self._forms:
            text = text.replace(form, SECRET)
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        if self._home:
            text = re.sub(rf"{re.escape(self._home)}(?![\w.-])", "~", text)
        return without_public_addresses(_HOMES.sub(r"/\1/(user)", text), "")


def _written(secret: str) -> tuple[str, ...]:
    """How programs write it: as it is, in JSON, and in URLs."""
    return secret, json.dumps(secret)[1:-1], quote(secret, safe=""), quote(secret), quote_plus(secret)


def shown_variable(name: str, value: str) -> str:
    """A line with a variable, without its value if that is a secret by its name."""
    return f"{name}={SECRET if _SENSITIVE.search(name) and value else value}"


def _of_variables(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if _SENSITIVE.search(name) and not os.path.exists(value) and not value.isdecimal():
            yield value
    for name in (SECRET_VARIABLE, old_name(SECRET_VARIABLE)):
        yield environment.get(name, "")


def _of_files(config: SparkConfig) -> Iterator[str]:
    """The contents of the files in which secrets usually are."""
    hub = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    token = os.environ.get("HF_TOKEN_PATH")
    for path in (config.secret_file, default_secret_file(), hub / "token", Path(token) if token else None):
        if path is None:
            continue
        try:
            yield read_regular(path, SMALL_FILE).decode()
        except (OSError, ValueError):  # there is none, or it is not this user's
            continue
