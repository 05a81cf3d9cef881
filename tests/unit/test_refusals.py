"""What vLLM does not take, in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_spark.errors import ConfigurationError
from vllm_spark.refusals import vllms_objections

from .folder_rights import no_entry


def test_a_model_whose_folder_may_not_be_entered(tmp_path: Path) -> None:
    """vLLM takes it for the name of a model on the hub, and complains about that."""
    model = tmp_path / "model"
    with no_entry(tmp_path), pytest.raises(ConfigurationError) as caught, vllms_objections(str(model)):
        raise OSError(f"Repo id must be in the form 'repo_name': '{model}'")
    assert (
        str(caught.value)
        == f"the model {model} cannot be read (Permission denied); let the user that serves it read it"
    )
    with pytest.raises(ConfigurationError, match=r"there is no folder .*/model; give"), vllms_objections(str(model)):
        raise OSError("the same")


def test_a_single_file_that_vllm_does_not_take(tmp_path: Path) -> None:
    """It is there, and not a folder: both are said."""
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(ConfigurationError) as caught, vllms_objections(str(model)):
        raise OSError(f"It looks like the config file at '{model}' is not a valid JSON file.")
    assert str(caught.value) == (
        f"the single file {model} cannot be loaded as a model by this vLLM (It looks like the config file at '{model}' "
        "is not a valid JSON file); give a folder"
    )


def test_a_package_that_vllm_lacks() -> None:
    """What reads s3:// is not part of plain vLLM."""
    with pytest.raises(ConfigurationError) as caught, vllms_objections("s3://bucket/model"):
        raise ModuleNotFoundError("No module named 'runai_model_streamer'")
    assert str(caught.value) == (
        "vLLM needs a package that it cannot import here (No module named 'runai_model_streamer'); install it into the "
        "environment of vLLM on both machines"
    )
