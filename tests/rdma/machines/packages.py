"""The Debian packages that the machines need on this host, whose programs and libraries run inside them too."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import CannotRun

NEEDED = tuple(Path(__file__).with_name("packages.txt").read_text().split())
"""A file, because `.ci/run` reads it too. Not rdma-core: it upgrades systemd, and devices are made by hand here."""

TOOL_SECONDS = 600.0


def missing() -> list[str]:
    """Those of `NEEDED` that are not installed.

    Raises:
        CannotRun: this host is not a Debian on x86-64.
    """
    if platform.machine() != "x86_64":
        raise CannotRun(f"the machines run this host's programs on x86-64, and this host is {platform.machine()}")
    if shutil.which("dpkg-query") is None or shutil.which("apt-get") is None:
        raise CannotRun("the machines are made of Debian packages, and this host has no dpkg-query or apt-get")
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *NEEDED]
    shown = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout
    installed = {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}
    return [package for package in NEEDED if package not in installed]


def require() -> None:
    """Does nothing if all packages are installed.

    Raises:
        CannotRun: some are missing; the message names them.
    """
    if lacking := missing():
        raise CannotRun(f"Debian packages are missing: {' '.join(lacking)}; `make test-rdma` as root installs them")


def install() -> None:
    """Installs the packages that are missing.

    Raises:
        CannotRun: only root may, or apt-get failed.
    """
    lacking = missing()
    if not lacking:
        return
    if os.geteuid() != 0:
        raise CannotRun(f"only root can install the missing packages: apt-get install {' '.join(lacking)}")
    apt("update", "-qq")
    apt("install", "-y", "-qq", "--no-install-recommends", *lacking)


def apt(*arguments: str, cwd: str | os.PathLike[str] | None = None) -> None:
    """Runs apt-get without questions.

    Raises:
        CannotRun: it failed, or took longer than `TOOL_SECONDS`.
    """
    run_tool(["apt-get", *arguments], cwd=cwd)


def run_tool(argv: Sequence[str], cwd: str | os.PathLike[str] | None = None) -> str:
    """Runs one of the host's programs and returns what it printed.

    Raises:
        CannotRun: it failed, or took longer than `TOOL_SECONDS`; the message has its last words.
    """
    command = " ".join(argv)
    try:
        done = subprocess.run(
            list(argv),
            cwd=cwd,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TOOL_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise CannotRun(f"{argv[0]} is missing; `make test-rdma` as root installs what is needed") from None
    except subprocess.TimeoutExpired:
        raise CannotRun(f"`{command}` took longer than {TOOL_SECONDS:g} s; try it by hand") from None
    if done.returncode != 0:
        last_words = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise CannotRun(f"`{command}` failed with exit code {done.returncode}: {last_words}")
    return done.stdout
