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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETUP_NEEDS = ("setuptools<81", "setuptools_scm", "setuptools_rust", "wheel", "packaging", "jinja2", "cmake", "ninja")


PIP_SECONDS = 600


class FetchError(Exception):
    """A release could not be had; the message says why."""


def fetch(versions: Sequence[str], into: Path) -> dict[str, Path | FetchError]:
    """For each release the folder that holds its package `vllm`, fetched if need be, or why it cannot be had.

    All at once: most of the time goes into what pip does before it hands a release over.
    """
    found: dict[str, Path | FetchError] = {
        version: into / f"vllm-{version}" for version in versions if _is_there(into / f"vllm-{version}")
    }
    missing = [version for version in versions if version not in found]
    if not missing:
        return found
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(len(missing)) as pool:
        needs = Path(work, "needs")
        try:
            _pip("install", "--target", str(needs), *SETUP_NEEDS)
        except FetchError as error:
            return found | dict.fromkeys(missing, error)
        return found | dict(
            zip(missing, pool.map(lambda version: _fetched(version, into, needs), missing), strict=True)
        )


def _fetched(version: str, into: Path, needs: Path) -> Path | FetchError:
    target = into / f"vllm-{version}"
    with tempfile.TemporaryDirectory() as work:
        download = Path(work, "download")
        environment = {
            "PYTHONPATH": str(needs),
            "VLLM_TARGET_DEVICE": "empty",
            "VLLM_VERSION_OVERRIDE": version,
            "SETUPTOOLS_SCM_PRETEND_VERSION": version,
        }
        source = ("--no-binary", ":all:", "--no-deps", "--no-build-isolation")
        try:
            _pip("download", *source, "-d", str(download), f"vllm=={version}", environment=environment)
        except FetchError as error:
            return error
        _unpack(next(download.glob("*.tar.gz")), into)
    return target if _is_there(target) else FetchError(f"vLLM {version}'s source distribution holds no package vllm")


def _is_there(target: Path) -> bool:
    return (target / "vllm" / "__init__.py").is_file()


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=PIP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip {arguments[0]} took more than {PIP_SECONDS} s; try again later") from None
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
    found = fetch(args.versions, args.into)
    for version, folder in found.items():
        if isinstance(folder, FetchError):
            print(f"vLLM {version}: {folder}", file=sys.stderr)
        else:
            print(folder)
    return int(any(isinstance(folder, FetchError) for folder in found.values()))


if __name__ == "__main__":
    sys.exit(main())
