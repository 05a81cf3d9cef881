"""The follower's vLLM configuration names its own folders, in every field that names files that a worker loads."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import COMMIT, cache_model
from vllm_spark.errors import RefusedError
from vllm_spark.executor.model_files.placement import place_compared, place_files
from vllm_spark.models.tiny import make_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_spark.executor.model_files.loaded import files_of, one_for_each_place


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alice")


@pytest.fixture(scope="module")
def config(alice: Path) -> VllmConfig:
    """Of an engine with a model, a draft model and a tokenizer in three folders."""
    model, draft = (str(make_tiny_model(alice / name, "dense")) for name in ("model", "draft"))
    tokenizer = str(make_tiny_model(alice / "tokenizer", "dense"))
    return EngineArgs(
        model=model,
        tokenizer=tokenizer,
        hf_config_path=model,
        generation_config=model,
        speculative_config={"model": draft, "num_speculative_tokens": 2, "method": "draft_model"},
        max_model_len=512,
    ).create_engine_config()


def strings_in(value: Any, path: str = "config", seen: set[int] | None = None) -> Iterator[tuple[str, str]]:
    """Every text in an object and in what it holds, with the way to it."""
    seen = set() if seen is None else seen
    if isinstance(value, (str, Path)):
        yield path, str(value)
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from strings_in(inner, f"{path}[{key!r}]", seen)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for inner in value:
                yield from strings_in(inner, f"{path}[]", seen)
        elif dataclasses.is_dataclass(value) or hasattr(value, "to_dict"):
            for name, inner in vars(value).items():
                yield from strings_in(inner, f"{path}.{name}", seen)


def test_no_path_of_the_leaders_is_left(config: VllmConfig, alice: Path) -> None:
    """But in what clients see, which stays the leader's."""
    offered = one_for_each_place(files_of(config))
    assert [each.what for each in offered] == ["model", "model's tokenizer", "draft model"]
    assert [each.required for each in offered] == [True, False, True]
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    before = [where for where, text in strings_in(theirs) if text.startswith(str(alice))]
    assert {"config.model_config.model", "config.speculative_config.draft_model_config.model"} <= set(before)
    place_files(theirs, {each.place: Path("/bob") / Path(each.place).name for each in offered})
    left = [where for where, text in strings_in(theirs) if text.startswith(str(alice))]
    assert left == [
        "config.model_config.served_model_name",
        "config.speculative_config.draft_model_config.served_model_name",
    ]
    assert theirs.model_config.model == "/bob/model"
    assert theirs.model_config.tokenizer == "/bob/tokenizer"
    assert theirs.model_config.hf_config._name_or_path == "/bob/model"
    assert theirs.speculative_config.model == "/bob/draft"
    assert theirs.speculative_config.draft_model_config.model == "/bob/draft"
    assert config.model_config.model == str(alice / "model")


def test_a_tokenizer_that_workers_read_is_compared_with_its_model(alice: Path) -> None:
    """One folder is found for both: the tokenizer's files of another snapshot are not looked for."""
    folder = make_tiny_model(alice / "two-vocabularies", "dense")
    draft = make_tiny_model(alice / "other-vocabulary", "dense")
    speculative = {"model": str(draft), "num_speculative_tokens": 2, "method": "draft_model"}
    made = EngineArgs(
        model=str(folder), speculative_config={**speculative, "use_heterogeneous_vocab": True}, max_model_len=512
    ).create_engine_config()
    offered = files_of(made)
    assert [(each.what, each.with_tokenizer) for each in offered] == [("model", True), ("draft model", True)]
    assert all("tokenizer.json" in each.identity.configuration for each in offered)
    (draft / "tokenizer_config.json").write_text("{}")
    assert offered[1].identity_at(draft).difference(offered[1].identity) == (
        "the configuration file tokenizer_config.json has other content here"
    )


def test_files_of_options(config: VllmConfig, alice: Path) -> None:
    """An option may name a single file that each worker reads."""
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    scheme = alice / "quantization.json"
    scheme.write_text("{}")
    theirs.model_config.hf_overrides = {"quantization_config_file": str(scheme), "rope_theta": 1}
    (offered,) = (each for each in files_of(theirs) if each.kind == "file")
    assert (offered.what, offered.place) == ("quantization_config_file of --hf-overrides", str(scheme))
    place_files(theirs, {offered.place: Path("/bob/q.json")})
    assert theirs.model_config.hf_overrides == {"quantization_config_file": "/bob/q.json", "rope_theta": 1}


def test_a_draft_model_is_compared(config: VllmConfig, alice: Path) -> None:
    weights = alice / "draft" / "model.safetensors"
    content = weights.read_bytes()
    before = {each.what: each.identity for each in files_of(config)}
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        after = {each.what: each.identity for each in files_of(config)}
    finally:
        weights.write_bytes(content)
    assert before["model"] == after["model"]
    assert before["draft model"] != after["draft model"]


def test_a_single_file_has_no_weights_in_these_formats(config: VllmConfig, alice: Path) -> None:
    """vLLM 0.32 reads GGUF files with a plugin alone, which brings a load format of its own."""
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    file = alice / "m.gguf"
    file.write_bytes(b"GGUF")
    theirs.speculative_config = None
    theirs.model_config.model = theirs.model_config.tokenizer = str(file)
    with pytest.raises(RefusedError, match=rf"^the model {file} is a single file, from which .* format auto"):
        files_of(theirs)
    theirs.load_config.load_format = "gguf"
    (offered,) = files_of(theirs)
    assert (offered.place, list(offered.identity.weights)) == (str(file), ["m.gguf"])


OTHER_COMMIT = COMMIT[::-1]


@pytest.fixture
def two_revisions(alice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The leader's snapshots of two commits of a repository, which differ in their weights. Its user is offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other = shutil.copytree(alice / "model", tmp_path / "other")
    content = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    first = cache_model(alice / "model", tmp_path, "somebody/tiny", COMMIT)
    return first, cache_model(other, tmp_path, "somebody/tiny", OTHER_COMMIT)


def of_two_revisions(config: VllmConfig) -> VllmConfig:
    """A configuration with the names that vLLM keeps if its user is online."""
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    model, speculative = theirs.model_config, theirs.speculative_config
    draft = speculative.draft_model_config
    for each, revision in ((model, COMMIT), (draft, OTHER_COMMIT)):
        each.model = each.tokenizer = each.hf_config._name_or_path = "somebody/tiny"
        each.revision = each.tokenizer_revision = revision
    model.hf_config_path = model.generation_config = None
    speculative.model, speculative.revision = "somebody/tiny", OTHER_COMMIT
    return theirs


def test_a_draft_model_of_another_revision(config: VllmConfig, two_revisions: tuple[Path, Path]) -> None:
    """It has the target's name, and other files."""
    first, second = (str(snapshot) for snapshot in two_revisions)
    theirs = of_two_revisions(config)
    files = files_of(theirs)
    offered = one_for_each_place(files)
    assert [(each.what, each.place) for each in offered] == [("model", first), ("draft model", second)]
    place_compared(theirs, files)
    model, draft = theirs.model_config, theirs.speculative_config.draft_model_config
    assert (model.model, model.tokenizer, model.hf_config._name_or_path) == (first, first, first)
    assert (draft.model, draft.tokenizer, draft.hf_config._name_or_path) == (second, second, second)
    assert theirs.speculative_config.model == second
    place_files(theirs, {first: Path("/bob/first"), second: Path("/bob/second")})
    assert (model.model, draft.model) == ("/bob/first", "/bob/second")
    assert (model.tokenizer, draft.tokenizer) == ("/bob/first", "/bob/second")


def test_a_tokenizer_of_another_revision(config: VllmConfig, two_revisions: tuple[Path, Path]) -> None:
    theirs = of_two_revisions(config)
    theirs.speculative_config = None
    theirs.model_config.tokenizer_revision = OTHER_COMMIT
    files = files_of(theirs)
    assert [(each.what, each.place) for each in files] == [
        ("model", str(two_revisions[0])),
        ("model's tokenizer", str(two_revisions[1])),
    ]
    place_compared(theirs, files)
    assert theirs.model_config.tokenizer == str(two_revisions[1])


def test_a_draft_model_in_the_folder_of_the_models_tokenizer(config: VllmConfig, alice: Path) -> None:
    """Its weights are compared: the folder's entry is the model's."""
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    theirs.model_config.tokenizer = str(alice / "draft")
    offered = one_for_each_place(files_of(theirs))
    assert {each.place: each.kind for each in offered}[str(alice / "draft")] == "model"


def test_both_ranks_load_in_the_format_that_was_compared(config: VllmConfig, alice: Path, tmp_path: Path) -> None:
    """`auto` reads Mistral's files where there are any, which the follower may have besides the leader's."""
    leaders = shutil.copytree(alice / "model", tmp_path / "leaders")
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (leaders / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    theirs.model_config.model = str(leaders)
    (model, *_) = files = files_of(theirs)
    place_compared(theirs, files)
    assert (theirs.load_config.load_format, theirs.speculative_config.draft_load_config) == ("hf", None)
    followers = shutil.copytree(leaders, tmp_path / "followers")
    (followers / "consolidated.safetensors").write_bytes(b"the same weights with other names")
    assert model.identity_at(followers) == model.identity

    theirs = pickle.loads(pickle.dumps(config))
    theirs.speculative_config.draft_model_config.model = str(followers)
    files = files_of(theirs)
    assert [list(each.identity.weights) for each in files if each.kind == "model"] == [
        ["model.safetensors"],
        ["consolidated.safetensors"],
    ]
    place_compared(theirs, files)
    assert theirs.load_config.load_format == "hf"
    assert theirs.speculative_config.draft_load_config.load_format == "mistral"


def test_vllms_loader_reads_the_same_weight_files(alice: Path, tmp_path: Path) -> None:
    """The loader itself is asked, for each format and for folders with several copies of the weights."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from vllm_spark.executor.model_files.weight_files import FILE_FORMATS, weight_files

    sharded = {"model-1.safetensors", "model-2.safetensors"}
    beside = {"model.bin", "training_args.bin", "model.pt", "optimizer.pt"}
    mistral = {"consolidated.safetensors", "consolidated-1.safetensors"}
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    compared = 0
    for number, names in enumerate((sharded, sharded | beside, sharded | mistral | beside, beside, mistral)):
        for with_index in (False, True):
            folder = tmp_path / f"{number}-{with_index}"
            folder.mkdir()
            for name in names | {"copy.safetensors"} if sharded <= names else names:
                (folder / name).touch()
            if with_index and sharded <= names:
                (folder / "model.safetensors.index.json").write_text(index)
            if with_index and mistral <= names:
                weight_map = {"weight_map": {"a": "consolidated-1.safetensors"}}
                (folder / "consolidated.safetensors.index.json").write_text(json.dumps(weight_map))
            for load_format in FILE_FORMATS:
                loader = get_model_loader(LoadConfig(load_format=load_format))
                try:
                    _, paths, *_ = loader._prepare_weights(str(folder), None, None, True, None)
                except RuntimeError:  # it finds none
                    paths = []
                mine = weight_files(folder, sorted(path.name for path in folder.iterdir()), load_format)
                assert sorted(mine) == sorted(Path(path).name for path in paths), (names, with_index, load_format)
                compared += bool(paths)
    assert compared > len(FILE_FORMATS)
