"""Same model, or not: digests of configuration and weight files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_spark.errors import RefusedError
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.loaded import existing_path
from vllm_spark.executor.model_files.weights import missing_weights

from .folder_rights import no_entry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model-1.safetensors").write_bytes(bytes(1000))
    (folder / "model-2.safetensors").write_bytes(bytes(2000))
    return folder


def difference(before: ModelIdentity, folder: Path) -> str | None:
    return ModelIdentity.of(folder).difference(before)


def test_every_kind_of_difference_is_named(model: Path) -> None:
    before = ModelIdentity.of(model)
    assert difference(before, model) is None
    (model / "README.md").write_text("not part of a model")
    assert difference(before, model) is None
    (model / "model-2.safetensors").write_bytes(bytes(1999) + b"\1")
    assert difference(before, model) == "the weight file model-2.safetensors has other content here"
    (model / "model-2.safetensors").unlink()
    assert difference(before, model) == "the weight file model-2.safetensors is missing here"
    (model / "model-2.safetensors").write_bytes(bytes(2000))
    (model / "extra.safetensors").write_bytes(b"x")
    assert difference(before, model) == "the weight file extra.safetensors exists only here"
    (model / "config.json").write_text('{"hidden_size": 9}')
    assert difference(before, model) == "the configuration file config.json has other content here"


def test_only_what_would_be_loaded_is_compared(model: Path) -> None:
    """`hf download` fetches every format of a model, vLLM the first that it can use."""
    before = ModelIdentity.of(model)
    (model / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    assert difference(before, model) is None
    for file in model.glob("*.safetensors"):
        file.unlink()
    assert ModelIdentity.of(model).weights.keys() == {"pytorch_model.bin"}


def test_weights_outside_of_the_index_are_not_compared(model: Path) -> None:
    """One machine may have downloaded more of the same commit than the other."""
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = ModelIdentity.of(model)
    (model / "consolidated.safetensors").write_bytes(b"the same weights, as Mistral lays them out")
    (model / "model-1 (copy).safetensors").write_bytes(bytes(1000))
    assert difference(before, model) is None
    assert before.weights.keys() == {"model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize(
    ("load_format", "loaded"),
    [
        ("hf", {"model-1.safetensors", "model-2.safetensors"}),
        ("safetensors", {"model-1.safetensors", "model-2.safetensors"}),
        ("mistral", {"consolidated-1.safetensors"}),
        ("pt", {"model.pt"}),
        ("npcache", {"pytorch_model.bin"}),
        ("of a plugin", {f"{name}.safetensors" for name in ("model-1", "model-2", "consolidated-1", "consolidated")}),
    ],
)
def test_a_load_format_has_files_of_its_own(model: Path, load_format: str, loaded: set[str]) -> None:
    for name in ("consolidated.safetensors", "consolidated-1.safetensors", "model.pt", "pytorch_model.bin"):
        (model / name).write_bytes(b"weights")
    for name in ("training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(b"of a trainer")
    for name, files in (("model", ("model-1", "model-2")), ("consolidated", ("consolidated-1",))):
        index = {"weight_map": {file: f"{file}.safetensors" for file in files}}
        (model / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    assert ModelIdentity.of(model, load_format=load_format).weights.keys() == loaded


def test_a_file_that_cannot_be_read(model: Path) -> None:
    (model / "model-3.safetensors").symlink_to(model / "nowhere")
    with pytest.raises(RefusedError, match=r"model-3\.safetensors cannot be read \(No such file"):
        ModelIdentity.of(model)


def test_what_is_no_part_of_the_model_is_not_looked_at(model: Path, tmp_path: Path) -> None:
    """A link may lead to itself, or where nobody may look; a pipe has no end to read to."""
    before = ModelIdentity.of(model)
    (model / "loop").symlink_to("loop")
    (tmp_path / "private").mkdir()
    (model / "notes").symlink_to(tmp_path / "private" / "notes")
    os.mkfifo(model / "quantize_config.json")
    with no_entry(tmp_path / "private"):
        assert difference(before, model) is None
    (model / "model-3.safetensors").symlink_to("model-3.safetensors")
    with pytest.raises(RefusedError, match=r"model-3\.safetensors cannot be read \(Too many levels"):
        ModelIdentity.of(model)


def test_a_folder_that_may_not_be_entered(model: Path, tmp_path: Path) -> None:
    """Of a model in another user's home, or with the rights of a careless copy."""
    with no_entry(tmp_path), pytest.raises(RefusedError) as caught:
        existing_path("model", str(model))
    assert str(caught.value) == f"{model} cannot be read (Permission denied); let the user that serves it read it"
    for with_weights in (True, False):
        with no_entry(model), pytest.raises(RefusedError) as caught:
            ModelIdentity.of(model, with_weights=with_weights)
        assert str(caught.value) == f"{model} cannot be read (Permission denied); let the user that serves it read it"


def test_a_name_of_the_hub_in_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a relative path too, but nobody means the folder where the process happens to be."""
    monkeypatch.chdir(tmp_path)
    with no_entry(tmp_path):
        assert existing_path("model", "somebody/something") is None


def test_a_file_that_may_not_be_read(model: Path) -> None:
    with no_entry(model / "model-1.safetensors"), pytest.raises(RefusedError) as caught:
        ModelIdentity.of(model)
    assert "model-1.safetensors cannot be read (Permission denied); the model must be" in str(caught.value)
    assert str(caught.value).endswith("complete here, and this user's to read")


def test_dummy_weights_are_not_compared(model: Path) -> None:
    assert ModelIdentity.of(model, with_weights=False).weights == {}


@pytest.mark.parametrize("offset", [100, (200 << 20) - 5])
def test_large_files_are_sampled_at_both_ends(tmp_path: Path, offset: int) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(200 << 20)
    before = ModelIdentity.of(tmp_path)
    with weights.open("r+b") as file:
        file.seek(offset)
        file.write(b"\1")
    assert difference(before, tmp_path) == "the weight file model.safetensors has other content here"


def test_another_checkpoint_of_the_same_size_differs_in_the_middle(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(200 << 20)
    before = ModelIdentity.of(tmp_path)
    with weights.open("r+b") as file:
        for megabyte in range(2, 198):
            file.seek(megabyte << 20)
            file.write(b"\1" * (1 << 20))
    assert difference(before, tmp_path) is not None


def test_what_a_name_leads_to_on_the_leader(tmp_path: Path) -> None:
    assert existing_path("model", str(tmp_path)) == tmp_path
    (tmp_path / "m.gguf").touch()
    assert existing_path("model", f"{tmp_path}/m.gguf") == tmp_path / "m.gguf"
    assert existing_path("model", "nobody/nothing") is None
    for path in ("/no/such/model", "~no-such-user/model", "./model"):
        with pytest.raises(RefusedError, match=rf"^there is no draft model in {path} on .*; copy it there from the"):
            existing_path("draft model", path)


def test_weights_that_an_index_names(model: Path) -> None:
    assert missing_weights(model) == []
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-3.safetensors", "c": "model-3.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing_weights(model) == ["model-3.safetensors"]
    (model / "model.safetensors.index.json").write_text("[]")
    assert missing_weights(model) == []
