#!/usr/bin/env python3
"""Fetches the Python sources of vLLM releases, to check patches and hooks against versions that are not installed.

    python tools/fetch_vllm_sources.py --into build/vllm-sources 0.26.0 0.33.0

Only pip is asked, for each release's source distribution; its Python files go to INTO/vllm-VERSION/. What is there
already is not fetched again. Pip insists on preparing a source distribution's metadata before it hands it over, so
what vLLM's setup script imports is installed into a temporary folder, and the version it would guess is given.
Needs torch in the running interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SETUP_NEEDS = ("setuptools<81", "setuptools_scm", "setuptools_rust", "wheel", "packaging", "jinja2", "cmake", "ninja")


class FetchError(Exception):
    """A release could not be had; the message says why."""


def fetch(version: str, into: Path) -> Path:
    """Returns the folder that holds the package `vllm` of that release, fetching it if need be.

    Raises:
        FetchError: pip could not get it.
    """
    target = into / f"vllm-{version}"
    if (target / "vllm" / "__init__.py").is_file():
        return target
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        needs, download = Path(work, "needs"), Path(work, "download")
        _pip("install", "--target", str(needs), *SETUP_NEEDS)
        environment = {
            "PYTHONPATH": str(needs),
            "VLLM_TARGET_DEVICE": "empty",
            "VLLM_VERSION_OVERRIDE": version,
            "SETUPTOOLS_SCM_PRETEND_VERSION": version,
        }
        source = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation")
        _pip("download", *source, "-d", str(download), f"vllm=={version}", environment=environment)
        _unpack(next(download.glob("*.tar.gz")), into)
    if not (target / "vllm" / "__init__.py").is_file():
        raise FetchError(f"the source distribution of vLLM {version} holds no package vllm")
    return target


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise FetchError(f"pip {arguments[0]} failed: {(errors or ['no reason given'])[-1].strip()}")


def _unpack(archive: Path, into: Path) -> None:
    """Takes the package's Python files, and nothing that would land elsewhere."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and member.name.endswith(".py") and parts[1:2] == ("vllm",) and ".." not in parts:
                tar.extract(member, into)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--into", type=Path, default=Path("build/vllm-sources"))
    args = parser.parse_args()
    for version in args.versions:
        try:
            print(fetch(version, args.into))
        except FetchError as error:
            print(f"vLLM {version}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
