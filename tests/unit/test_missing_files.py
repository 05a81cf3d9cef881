"""A leader that lacks what its command line names gets it from its follower before vLLM starts. Real sockets, TLS."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.hub import COMMIT
from vllm_spark.config.settings import SparkConfig
from vllm_spark.entrypoints import missing_files
from vllm_spark.entrypoints.missing_files import fetch_missing
from vllm_spark.errors import PeerLostError, RefusedError
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.handshake.client import make_connector
from vllm_spark.executor.handshake.leader_search import LeaderSearch
from vllm_spark.executor.handshake.messages import CONTROL, Sought
from vllm_spark.executor.model_files import comparison
from vllm_spark.executor.model_files.hub_cache import cached_snapshot
from vllm_spark.executor.model_sync import fetch_from_follower, receiver

from .test_leader_search import messages
from .test_model_copy import AT_ALICES, COPIED, as_hub, contents, home_of, model_at

ADDRESS = "127.0.0.1"


@pytest.fixture(autouse=True)
def alice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """The leader's user, who is offline."""
    caplog.set_level(logging.INFO, "vllm_spark")
    monkeypatch.setattr(missing_files, "_asked", False)
    return home_of(tmp_path / "alice", monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The follower's."""
    return model_at(tmp_path / "bob" / "tiny")


class Followers:
    """Followers in threads of this process, which all look for a leader at one port until the test ends."""

    def __init__(self, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pool, self._monkeypatch, self._stopped = pool, monkeypatch, False

    def start(self, port: int, mapping: str | None, cache: Path | None) -> Future[None]:
        """One that has the mapped folders, and in its cache what is in `cache`."""
        config = SparkConfig(port=port, model_path=mapping)
        find = fetch_from_follower.find_named

        def find_bobs(sought: Sought, folders: dict[str, Path]) -> Any:
            # Both users are in this process, and bob's cache is another one.
            with self._monkeypatch.context() as patch:
                patch.setattr(
                    fetch_from_follower,
                    "cached_snapshot",
                    lambda name, revision: cached_snapshot(name, revision, cache),
                )
                return find(sought, folders)

        self._monkeypatch.setattr(fetch_from_follower, "find_named", find_bobs)

        def follow() -> None:
            connector = make_connector(config, ADDRESS, port)
            search = LeaderSearch(config, lambda: connector, lambda *given: None, lambda environment: None, once=True)
            while not self._stopped:
                if (control := connector.connect(CONTROL)) is None:
                    time.sleep(0.02)
                    continue
                _answer(search, control, connector, config)
                return

        return self._pool.submit(follow)

    def stop(self) -> None:
        self._stopped = True


def _answer(search: LeaderSearch, control: Connection, connector: Any, config: SparkConfig) -> None:
    try:
        frame = control.expect(Kind.SEARCH, timeout=20)
        fetch_from_follower.answer_search(control, frame, connector, config)
    finally:
        control.close()


@pytest.fixture
def followers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Followers]:
    with ThreadPoolExecutor() as pool:
        made = Followers(pool, monkeypatch)
        yield made
        made.stop()


@pytest.fixture
def config() -> SparkConfig:
    import socket

    with socket.create_server((ADDRESS, 0)) as server:
        return SparkConfig(address=ADDRESS, port=server.getsockname()[1], join_timeout=20.0)


def arguments(model: str, **more: Any) -> argparse.Namespace:
    """What `vllm serve MODEL` has parsed."""
    common: dict[str, Any] = {"model": "default", "model_tag": model, "revision": None, "tokenizer": None}
    common |= {"tokenizer_revision": None, "download_dir": None, "load_format": "auto", "speculative_config": None}
    return argparse.Namespace(**common | {"lora_modules": None, "served_model_name": None} | more)


def test_a_folder(model: Path, alice: Path, config: SparkConfig, followers: Followers) -> None:
    """It is copied to the path that the leader's user has typed."""
    here = alice / "models" / "tiny"
    here.parent.mkdir()
    following = followers.start(config.port, f"{here}={model}", None)
    args = arguments(str(here))
    fetch_missing(config, args)
    following.result(20)
    assert contents(here) == {name: content for name, content in contents(model).items() if name in COPIED}
    assert args.model_tag == str(here)


def test_a_name_of_the_hub(model: Path, alice: Path, tmp_path: Path, config: SparkConfig, followers: Followers) -> None:
    """vLLM then finds it in the leader's cache, where a branch says which commit it is."""
    as_hub(model, tmp_path / "bob/hub")
    following = followers.start(config.port, None, tmp_path / "bob/hub")
    args = arguments("somebody/tiny")
    fetch_missing(config, args)
    following.result(20)
    place = cached_snapshot("somebody/tiny", None)
    assert place == alice / f"hub/models--somebody--tiny/snapshots/{COMMIT}"
    assert contents(place).keys() == COPIED
    assert args.model_tag == "somebody/tiny"
    missing_files._asked = False
    fetch_missing(config, args)  # nobody listens: nothing is missing


def test_a_name_that_the_follower_has_in_a_folder(
    model: Path, alice: Path, config: SparkConfig, followers: Followers
) -> None:
    """Nobody knows the commit then: vLLM gets the path, and clients the name."""
    following = followers.start(config.port, f"somebody/tiny={model}", None)
    args = arguments("somebody/tiny")
    fetch_missing(config, args)
    following.result(20)
    place = Path(args.model_tag)
    assert place.parent == alice / "data/vllm-spark/models"
    assert contents(place).keys() == COPIED
    assert args.served_model_name == ["somebody/tiny"]


def test_draft_and_adapter(model: Path, alice: Path, tmp_path: Path, config: SparkConfig, followers: Followers) -> None:
    target = model_at(alice / "target")
    adapter = tmp_path / "bob" / "sql"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    draft, sql = alice / "draft", alice / "sql"
    following = followers.start(config.port, f"{draft}={model},{sql}={adapter}", None)
    speculative = json.dumps({"model": str(draft), "num_speculative_tokens": 2})
    modules = [SimpleNamespace(name="sql", path=str(sql))]
    fetch_missing(config, arguments(str(target), speculative_config=speculative, lora_modules=modules))
    following.result(20)
    assert contents(draft).keys() == COPIED
    assert contents(sql) == contents(adapter)


def test_what_neither_has(
    alice: Path, config: SparkConfig, followers: Followers, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM downloads it, or says what is wrong."""
    following = followers.start(config.port, None, None)
    args = arguments(AT_ALICES)
    fetch_missing(config, args)
    following.result(20)
    assert args.model_tag == AT_ALICES
    assert contents(alice) == {}
    assert messages(caplog, f"asks for the model {AT_ALICES}, which is not here")


def test_no_follower(config: SparkConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong path is reported soon all the same."""
    monkeypatch.setattr(missing_files, "_ASK_SECONDS", 0.2)
    fetch_missing(config, arguments(AT_ALICES))
    assert messages(caplog, r"The follower was not asked for the model /alice/tiny: no follower connected to")


@pytest.mark.parametrize(
    ("setting", "model", "more"),
    [
        ("off", AT_ALICES, {}),
        ("auto", "s3://bucket/tiny", {}),
        ("auto", AT_ALICES, {"load_format": "dummy"}),
    ],
    ids=["off", "object storage", "dummy weights"],
)
def test_nobody_is_asked(
    config: SparkConfig, monkeypatch: pytest.MonkeyPatch, setting: str, model: str, more: dict[str, Any]
) -> None:
    def ask(*given: Any) -> list[Path | None]:
        raise AssertionError("a follower was asked")

    monkeypatch.setattr(fetch_from_follower, "fetch_from_follower", ask)
    fetch_missing(config.model_copy(update={"model_sync": setting}), arguments(model, **more))


def test_a_leader_without_room(
    model: Path, alice: Path, config: SparkConfig, followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides say so, and the leader does not start."""
    monkeypatch.setattr(receiver, "free_bytes", lambda place: 1 << 20)
    here = alice / "tiny"
    following = followers.start(config.port, f"{here}={model}", None)
    with pytest.raises(RefusedError, match=r"needs 19\.\d MB more on"):
        fetch_missing(config, arguments(str(here)))
    with pytest.raises(RefusedError, match=r"the leader at .*: the model .* needs 19\.\d MB more on"):
        following.result(20)


def test_a_model_that_the_follower_has_in_part(
    model: Path, alice: Path, config: SparkConfig, followers: Followers
) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    here = alice / "tiny"
    following = followers.start(config.port, f"{here}={model}", None)
    fetch_missing(config, arguments(str(here)))
    following.result(20)
    assert contents(alice) == {}


def test_a_follower_that_is_lost_after_it_was_asked(config: SparkConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Not the same as none: what has arrived is kept, so the leader ends with the command."""

    def follow() -> None:
        connector = make_connector(config, ADDRESS, config.port)
        while (control := connector.connect(CONTROL)) is None:
            time.sleep(0.02)
        control.expect(Kind.SEARCH, timeout=20)
        control.close()

    with ThreadPoolExecutor() as pool:
        following = pool.submit(follow)
        sentence = (
            rf"the follower on .* was lost after it was asked for the model {AT_ALICES} \(.*\); start this "
            "command again, and the copy continues"
        )
        with pytest.raises(RefusedError, match=sentence):
            fetch_missing(config, arguments(AT_ALICES))
        following.result(20)
    assert not messages(caplog, "was not asked")


@pytest.mark.parametrize("lost_at", [Kind.LEAVE, Kind.FAILURE])
def test_a_follower_that_is_lost_at_the_end_changes_nothing(
    model: Path,
    alice: Path,
    config: SparkConfig,
    followers: Followers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lost_at: Kind,
) -> None:
    """Neither the result, nor why there is none."""
    send = Connection.send

    def lose(self: Connection, kind: Kind, *given: Any, **more: Any) -> None:
        if kind is lost_at:
            raise PeerLostError("the connection was reset")
        send(self, kind, *given, **more)

    monkeypatch.setattr(Connection, "send", lose)
    here = alice / "tiny"
    following = followers.start(config.port, f"{here}={model}", None)
    if lost_at is Kind.FAILURE:
        monkeypatch.setattr(receiver, "free_bytes", lambda place: 1 << 20)
        with pytest.raises(RefusedError, match="MB more on"):
            fetch_missing(config, arguments(str(here)))
    else:
        fetch_missing(config, arguments(str(here)))
        assert contents(here).keys() == COPIED
    assert not messages(caplog, "was not asked")
    with pytest.raises(PeerLostError):
        following.result(20)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_files_are_looked_for_by_name(
    model: Path, alice: Path, monkeypatch: pytest.MonkeyPatch, load_format: str
) -> None:
    """Samples of all weights would take seconds at each start."""

    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    as_hub(model, alice / "hub")
    monkeypatch.setattr(comparison, "file_digest", read)
    assert list(missing_files._missing(arguments("somebody/tiny", load_format=load_format))) == []
    (cached_snapshot("somebody/tiny", None) / "model-1.safetensors").unlink()  # type: ignore[operator]
    (cached_snapshot("somebody/tiny", None) / "model-2.safetensors").unlink()  # type: ignore[operator]
    (missing,) = missing_files._missing(arguments("somebody/tiny", load_format=load_format))
    assert missing.name == "somebody/tiny"


@pytest.mark.parametrize("load_format", ["dummy", "tensorizer", "sharded_state", "gguf"])
def test_other_loaders_choose_their_files(alice: Path, tmp_path: Path, load_format: str) -> None:
    model = tmp_path / "other"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.tensors").write_text("")
    as_hub(model, alice / "hub")
    assert list(missing_files._missing(arguments("somebody/tiny", load_format=load_format))) == []


def test_a_relative_path_means_the_same_on_both_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    speculative = {"model": "./draft", "num_speculative_tokens": 2}
    modules = [SimpleNamespace(name="sql", path="./sql")]
    args = arguments("../tiny", tokenizer="./words", speculative_config=speculative, lora_modules=modules)
    names = [sought.name for sought in missing_files._missing(args)]
    assert names == [str(tmp_path.parent / "tiny"), *(str(tmp_path / name) for name in ("draft", "words", "sql"))]
    (own,) = missing_files._missing(arguments("~/tiny"))
    assert own.name == "~/tiny"  # below each user's home
