"""Leaves out thorough tests unless they were asked for, shares out tests among workers, compiles their programs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import notices
from .native.emulated_nics import EmulatedNics
from .native.programs import Programs, need
from .thorough import THOROUGH
from .workers import shared_folder

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from .distribution import Distribution


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from .distribution import rank_of

        items.sort(key=lambda item: rank_of(item.nodeid))
    if THOROUGH:
        return
    for item in items:
        if item.get_closest_marker("thorough") is not None:
            item.add_marker(pytest.mark.skip(reason="thorough; run it with VLLMSPARK_THOROUGH=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Distribution:
    from .distribution import Distribution

    return Distribution(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    notices.hand_over(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    notices.take_over(node.config, node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    notices.show(terminalreporter, config)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Restores the environment: what one test publishes in it would change the tests after it in the same worker."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Programs and libraries of tests/native, compiled once in a run; skips the test where there is no g++."""
    need("g++", "g++")
    folder = shared_folder(tmp_path_factory) / "programs"
    folder.mkdir(exist_ok=True)
    return Programs(folder)


@pytest.fixture
def user_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of tuned tables of a user who has none at first."""
    from vllm_spark.kernels import lookup

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    lookup.clear_cache()
    folder = lookup.user_folder()
    assert folder is not None
    yield folder
    lookup.clear_cache()


@pytest.fixture
def nics(programs: Programs) -> Iterator[EmulatedNics]:
    """Two rails between processes of this machine."""
    with tempfile.TemporaryDirectory(prefix="vllm-spark-nics-") as folder:
        nics = EmulatedNics(Path(folder), programs.libibverbs("verbs_emulated.cpp"))
        yield nics
        nics.close()
