"""A follower finds what its leader loads by what it is: in its own cache of the hub, or at the leader's path."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.hub import COMMIT, cache_model
from vllm_spark.errors import RefusedError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files import hub_cache
from vllm_spark.executor.model_files.comparison import Kind, ModelIdentity
from vllm_spark.executor.model_files.hub_cache import HubPlace, cached_snapshot, hub_place_of
from vllm_spark.executor.model_files.loaded import LoadedFiles, Origin
from vllm_spark.executor.model_files.own import find_own

from .folder_rights import no_entry

OTHER_COMMIT = COMMIT[::-1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The leader's, which tests hide from the follower by `hide`."""
    folder = tmp_path / "alice" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The follower's cache. Its user is offline."""
    from huggingface_hub import constants

    folder = tmp_path / "bob" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def of_leader(place: Path, name: str = "", kind: Kind = "model") -> LoadedFiles:
    origin: Origin = "path" if not name else "hub"
    identity = ModelIdentity.of(place, kind=kind)
    hub = hub_place_of(place)
    return LoadedFiles(kind, name or str(place), str(place), kind, identity, origin, hub, single_file=place.is_file())


def in_leaders_cache(model: Path, name: str = "") -> LoadedFiles:
    """As HF_HUB_OFFLINE has it, where vLLM puts a snapshot's path in place of a name; nobody else sees that path."""
    snapshot = cache_model(model, model.parent / "hub", "somebody/tiny")
    wanted = of_leader(snapshot, name)
    hide(model)
    return wanted


def hide(model: Path) -> None:
    model.parent.rename(model.parent.with_name("hidden"))


def hidden(model: Path) -> Path:
    return model.parent.with_name("hidden") / model.name


def refusal(wanted: LoadedFiles) -> str:
    with pytest.raises(RefusedError) as caught:
        find_own(wanted)
    return str(caught.value)


@pytest.mark.parametrize("name", ["", "somebody/tiny"], ids=["path", "name"])
def test_another_user_has_the_same_snapshot(model: Path, cache: Path, name: str) -> None:
    wanted = in_leaders_cache(model, name)
    assert wanted.hub == HubPlace("somebody/tiny", COMMIT)
    mine = cache_model(hidden(model), cache, "somebody/tiny")
    assert find_own(wanted) == mine


def test_another_commit_with_the_same_files(model: Path, cache: Path) -> None:
    """A change of a README makes a new commit."""
    wanted = in_leaders_cache(model)
    mine = cache_model(hidden(model), cache, "somebody/tiny", OTHER_COMMIT)
    assert find_own(wanted) == mine


def test_another_commit_with_other_weights(model: Path, cache: Path) -> None:
    wanted = in_leaders_cache(model)
    mine = cache_model(hidden(model), cache, "somebody/tiny", OTHER_COMMIT)
    (mine / "model.safetensors").write_bytes(bytes(999) + b"\1")
    host = host_name()
    assert refusal(wanted) == (
        f"the weight file model.safetensors has other content on {host} ({mine}), compared with the leader; "
        f"download it on {host}: hf download somebody/tiny --revision {COMMIT}"
    )


def test_the_same_commit_with_other_weights(model: Path, cache: Path) -> None:
    """Downloading it once more would change nothing."""
    wanted = in_leaders_cache(model)
    mine = cache_model(hidden(model), cache, "somebody/tiny")
    (mine / "model.safetensors").write_bytes(bytes(999) + b"\1")
    host = host_name()
    assert refusal(wanted) == (
        f"the weight file model.safetensors has other content on {host} ({mine}), compared with the leader; "
        f"delete {cache}/models--somebody--tiny on {host} and download it anew: "
        f"hf download somebody/tiny --revision {COMMIT}"
    )


def test_a_model_of_the_hub_that_is_not_here(model: Path, cache: Path) -> None:
    host = host_name()
    assert refusal(in_leaders_cache(model)) == (
        f"the model somebody/tiny, commit {COMMIT}, is not on {host}; "
        f"download it on {host}: hf download somebody/tiny --revision {COMMIT}"
    )


def test_a_file_of_the_snapshot_is_missing(model: Path, cache: Path) -> None:
    wanted = in_leaders_cache(model)
    mine = cache_model(hidden(model), cache, "somebody/tiny")
    (mine / "model.safetensors").unlink()
    assert f"the weight file model.safetensors is missing on {host_name()} ({mine})" in refusal(wanted)


def test_a_path_that_both_machines_have(model: Path, cache: Path) -> None:
    wanted = of_leader(model)
    assert find_own(wanted) == model
    (model / "config.json").write_text('{"hidden_size": 9}')
    host = host_name()
    assert refusal(wanted) == (
        f"the configuration file config.json has other content on {host} ({model}), compared with the leader; "
        f"copy the leader's model to {model} on {host}"
    )


def test_a_path_that_one_machine_has(model: Path, cache: Path) -> None:
    wanted = of_leader(model)
    hide(model)
    assert refusal(wanted) == f"there is no model in {model} on {host_name()}; copy the leader's there"


def test_what_the_leader_has_in_a_folder_is_in_the_followers_cache(model: Path, cache: Path) -> None:
    wanted = of_leader(model)
    other = cache_model(model, cache, "somebody/other")
    (other / "config.json").write_text('{"hidden_size": 16}')
    similar = cache_model(model, cache, "somebody/finetuned")  # the same architecture
    (similar / "model.safetensors").write_bytes(b"\1" * 1000)
    mine = cache_model(model, cache, "somebody/tiny")
    hide(model)
    assert find_own(wanted) == mine


@pytest.mark.parametrize(
    "layout",
    ["hub/models/somebody/tiny-1___5", "models/somebody/tiny-1.5", "models/somebody--tiny-1.5/snapshots/master"],
)
@pytest.mark.parametrize("origin", ["modelscope", "path"])
def test_a_model_of_modelscope(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, origin: Origin
) -> None:
    """Under its name, or under the path that vLLM puts in its place where it is offline."""
    name = "somebody/tiny-1.5" if origin == "modelscope" else str(model)
    wanted = LoadedFiles("model", name, str(model), "model", ModelIdentity.of(model), origin)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "bob"))
    mine = tmp_path / "bob" / layout
    shutil.copytree(model, mine)
    hide(model)
    assert find_own(wanted) == mine


def test_a_model_of_modelscope_that_is_not_here(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = LoadedFiles("model", "somebody/tiny", str(model), "model", ModelIdentity.of(model), "modelscope")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(cache))
    hide(model)
    host = host_name()
    assert refusal(wanted).startswith(f"the model somebody/tiny is not on {host} (")
    assert refusal(wanted).endswith(f"; download it on {host}: modelscope download --model somebody/tiny")


def test_object_storage_needs_a_package(model: Path, cache: Path) -> None:
    """vLLM streams weights from there on both ranks; the follower fetches the configuration for itself."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    wanted = LoadedFiles(
        "model", "s3://bucket/tiny", str(model), "model", ModelIdentity.of(model), "object storage", with_weights=False
    )
    host = host_name()
    assert refusal(wanted).startswith(f"the model s3://bucket/tiny is not on {host} (")
    assert "runai-model-streamer" in refusal(wanted)


def test_the_followers_copy_beats_another_one_at_the_leaders_path(model: Path, cache: Path) -> None:
    wanted = of_leader(model)
    mine = cache_model(model, cache, "somebody/tiny")
    (model / "model.safetensors").write_bytes(b"\1" * 1000)
    assert find_own(wanted) == mine


def test_a_path_that_may_not_be_read(model: Path, cache: Path) -> None:
    wanted = of_leader(model)
    for closed in (model, model.parent):
        with no_entry(closed):
            assert f"{model} cannot be read (Permission denied)" in refusal(wanted)


def test_a_single_file(model: Path, cache: Path) -> None:
    """Such as a GGUF model, or scales: whatever it is called here."""
    file = model / "m.gguf"
    file.write_bytes(b"weights")
    wanted = of_leader(file)
    assert wanted.identity.weights.keys() == {"m.gguf"}
    assert find_own(wanted) == file
    file.write_bytes(b"another")
    assert refusal(wanted).startswith(f"the model has other content on {host_name()} ({file})")
    file.unlink()
    assert refusal(wanted).startswith(f"there is no model in {file} on {host_name()}")


def test_a_single_file_of_a_snapshot(model: Path, cache: Path) -> None:
    (model / "m-q4.gguf").write_bytes(b"weights")
    snapshot = cache_model(model, model.parent / "hub", "somebody/tiny")
    wanted = of_leader(snapshot / "m-q4.gguf")
    assert wanted.hub == HubPlace("somebody/tiny", COMMIT, "m-q4.gguf")
    hide(model)
    mine = cache_model(hidden(model), cache, "somebody/tiny")
    assert find_own(wanted) == mine / "m-q4.gguf"


def test_a_folder_with_a_dot_in_its_name_is_downloaded_whole(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a repository with a folder for each version or size."""
    from huggingface_hub import constants

    shutil.copytree(model, model / "v1.5")
    wanted = in_leaders_cache(model)
    inner = Path(wanted.place) / "v1.5"
    shutil.copytree(hidden(model).parent / "hub", model.parent / "hub")
    wanted = of_leader(inner)
    hide_again = model.parent.with_name("hidden again")
    model.parent.rename(hide_again)
    asked: list[str] = []

    def download(place: HubPlace, names: list[str]) -> Path:
        asked.extend(names)
        return cache_model(hidden(model), cache, place.repository)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_cache, "download", download)
    assert find_own(wanted) == cache / "models--somebody--tiny/snapshots" / COMMIT / "v1.5"
    assert {"v1.5/config.json", "v1.5/model.safetensors"} <= set(asked)


def test_an_adapter(tmp_path: Path, cache: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    wanted = of_leader(adapter, kind="adapter")
    (adapter / "README.md").write_text("not loaded")
    assert find_own(wanted) == adapter
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    assert f"adapter_model.safetensors has other content on {host_name()} ({adapter})" in refusal(wanted)


def test_a_revision_names_a_branch_a_tag_or_a_commit(model: Path, cache: Path) -> None:
    snapshot = cache_model(model, cache, "somebody/tiny")
    (cache / "models--somebody--tiny/refs/v1.5").write_text(COMMIT)
    for revision in (None, "main", "v1.5", COMMIT):
        assert cached_snapshot("somebody/tiny", revision) == snapshot
    for repository, revision in (("somebody/tiny", "v2"), ("somebody/else", None), ("somebody/tiny", "../../..")):
        assert cached_snapshot(repository, revision) is None


def test_code_counts_where_it_may_be_executed(model: Path) -> None:
    (model / "modeling_own.py").write_text("layers = 1")
    before = ModelIdentity.of(model, with_code=True)
    assert ModelIdentity.of(model).configuration.keys() == {"config.json"}
    (model / "modeling_own.py").write_text("layers = 2")
    assert (
        ModelIdentity.of(model, with_code=True).difference(before)
        == "the configuration file modeling_own.py has other content here"
    )


def test_layers_after_the_model_count(model: Path) -> None:
    """sentence-transformers puts them into folders that modules.json names."""
    (model / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    dense = model / "2_Dense"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    (dense / "model.safetensors").write_bytes(b"dense")
    (model / "sparse_linear.pt").write_bytes(b"sparse")
    before = ModelIdentity.of(model)
    for name in ("2_Dense/model.safetensors", "sparse_linear.pt"):
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[::-1])
        assert ModelIdentity.of(model).difference(before) == f"the weight file {name} has other content here"
        (model / name).write_bytes(content)
    assert ModelIdentity.of(model).difference(before) is None


def test_files_that_did_not_change_are_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return read(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    before = ModelIdentity.of(model)
    assert reads
    reads.clear()
    assert ModelIdentity.of(model) == before
    assert not reads
    shutil.copy2(model / "config.json", model / "copy")
    (model / "copy").replace(model / "model.safetensors")
    assert ModelIdentity.of(model) != before
