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
