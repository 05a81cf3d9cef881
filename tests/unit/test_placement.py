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
from vllm_spark.executor.model_files.placement import place_files, place_on_leader
from vllm_spark.models.tiny import make_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_spark.executor.model_files.loaded import files_of, pin_load_formats


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
    offered = files_of(config)
    assert [each.what for each in offered] == ["model", "model's tokenizer", "draft model"]
    assert [each.required for each in offered] == [True, False, True]
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    before = [where for where, text in strings_in(theirs) if text.startswith(str(alice))]
    assert {"config.model_config.model", "config.speculative_config.draft_model_config.model"} <= set(before)
    place_files(theirs, {key: Path("/bob") / Path(each.place).name for each in offered for key in each.file_keys()})
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
    place_files(theirs, {("file", offered.place, None): Path("/bob/q.json")})
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with two commits of one repository, whose user is offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for commit, tag in ((COMMIT, "main"), (COMMIT[::-1], "draft")):
        model = make_tiny_model(tmp_path / tag, "dense")
        snapshot = cache_model(model, tmp_path / "hub", "somebody/tiny", commit)
        (snapshot / "tokenizer_config.json").write_text(json.dumps({"tag": tag}))
        (snapshot.parents[1] / "refs" / tag).write_text(commit)
    (tmp_path / "hub/models--somebody--tiny/refs/main").write_text(COMMIT)
    return tmp_path / "hub/models--somebody--tiny/snapshots"


def of_hub(config: VllmConfig) -> VllmConfig:
    """The same, with names where it has paths: vLLM, offline, would have put snapshots' paths there."""
    named: VllmConfig = pickle.loads(pickle.dumps(config))
    for model in (named.model_config, named.speculative_config.draft_model_config, named.speculative_config):
        model.model = "somebody/tiny"
    draft = named.speculative_config.draft_model_config
    for each in (named.model_config, draft):
        each.tokenizer = "somebody/tiny"
    named.model_config.hf_config_path = None
    named.model_config.generation_config = "auto"
    named.speculative_config.target_model_config = named.model_config
    named.load_config.load_format = "hf"
    return named


def test_a_draft_model_and_a_tokenizer_in_other_revisions(config: VllmConfig, cache: Path) -> None:
    named = of_hub(config)
    draft = named.speculative_config.draft_model_config
    named.speculative_config.revision = draft.revision = named.model_config.tokenizer_revision = "draft"
    offered = files_of(named)
    main, other = str(cache / COMMIT), str(cache / COMMIT[::-1])
    assert [(each.what, each.place) for each in offered if each.kind == "model"] == [
        ("model", main),
        ("draft model", other),
    ]
    assert ("model's tokenizer", other) in [(each.what, each.place) for each in offered]
    place_files(named, {key: Path(each.place) for each in offered for key in each.file_keys()})
    assert (named.model_config.model, named.model_config.tokenizer) == (main, other)
    assert (draft.model, named.speculative_config.model) == (other, other)


def test_code_of_another_revision_is_refused(config: VllmConfig, cache: Path) -> None:
    """Both ranks load a model's code from the folder with its weights."""
    named = of_hub(config)
    named.model_config.code_revision = "draft"
    files_of(named)  # no code is run
    named.model_config.trust_remote_code = True
    with pytest.raises(RefusedError, match=r"^--code-revision draft of the model somebody/tiny is not supported: "):
        files_of(named)


def test_the_leader_loads_what_was_compared(config: VllmConfig, cache: Path) -> None:
    """A branch may move on the hub meanwhile. A tokenizer is placed where a worker reads it, and was compared."""
    snapshot = str(cache / COMMIT)
    for two_vocabularies, tokenizer in ((False, "somebody/tiny"), (True, snapshot)):
        named = of_hub(config)
        named.speculative_config.use_heterogeneous_vocab = two_vocabularies
        place_on_leader(named, files_of(named))
        assert (named.model_config.model, named.model_config.tokenizer) == (snapshot, tokenizer)
        assert named.speculative_config.draft_model_config.model == snapshot


def test_the_leader_decides_what_auto_means(config: VllmConfig, alice: Path) -> None:
    """A follower's folder of the same commit may hold the weights in both formats."""
    theirs: VllmConfig = pickle.loads(pickle.dumps(config))
    mistral = alice / "mistral"
    shutil.copytree(alice / "draft", mistral)
    (mistral / "model.safetensors").rename(mistral / "consolidated.safetensors")
    theirs.speculative_config.model = theirs.speculative_config.draft_model_config.model = str(mistral)
    offered = files_of(theirs)
    pin_load_formats(theirs, offered)
    assert [each.load_format for each in offered if each.kind == "model"] == ["hf", "mistral"]
    assert theirs.load_config.load_format == "hf"
    assert theirs.speculative_config.draft_load_config.load_format == "mistral"
    more = alice / "more"
    shutil.copytree(alice / "model", more)
    (more / "consolidated.safetensors").write_bytes(b"the same in another layout")
    (more / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert offered[0].identity_at(more).difference(offered[0].identity) is None
