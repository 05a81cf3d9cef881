"""Reads a model's config.json from a folder, a file, this project's `configs/models`, or the hub."""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_spark.errors import ConfigurationError, first_line
from vllm_spark.files import TABLE_FILE, configs_folder, read_regular
from vllm_spark.models.weights import OTHER_QUANTIZATION_FILES, check_quantization_is_in_config, quantization_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""A model's name on the hub: OWNER/NAME, which is not a path."""


def read_model_config(model: str, *, cached_only: bool = False) -> tuple[str, dict[str, Any]]:
    """The name of a model and the content of its config.json.

    Args:
        model: a folder or file, a name in `configs/models`, or one on the hub.
        cached_only: whether a name on the hub is looked up in this user's cache alone.

    Raises:
        ConfigurationError: the file is missing or not a JSON object, or the quantization is described in another file.
    """
    given, shipped = Path(model), configs_folder() / "models"
    names = ", ".join(sorted(path.name for path in shipped.iterdir() if path.is_dir()))
    remedy = f"give a folder or file with a config.json, a model of the hub, or one of {names}"
    places = (given, given / "config.json", shipped / model / "config.json")
    try:
        path = next((path for path in places if path.is_file()), None)
    except OSError as error:
        raise ConfigurationError(f"the model {model} cannot be read ({error.strerror}); {remedy}") from None
    on_hub = path is None
    if path is None:
        if not _HUB_NAME.fullmatch(model):
            raise ConfigurationError(f"there is no model {model!r} here; {remedy}")
        path = _from_hub(model, "config.json", remedy, cached_only)
    try:
        config = json.loads(read_regular(path, TABLE_FILE))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object, as a config.json must")
    if path.name == "config.json":
        if on_hub and not quantization_of(config):
            for name in OTHER_QUANTIZATION_FILES:
                with suppress(ConfigurationError):  # it has none
                    _from_hub(model, name, remedy, cached_only)
        check_quantization_is_in_config(config, path.parent)
    return (path.parent.name if path.name == "config.json" and path.parent.parent == shipped else model), config


def _from_hub(model: str, name: str, remedy: str, cached_only: bool) -> Path:
    """The file `name` of a model that vLLM would load by this name."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigurationError(f"there is no model {model!r} here; {remedy}") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it retries for half a minute, and logs each time
    try:
        return Path(hf_hub_download(model, name, local_files_only=cached_only))
    except LocalEntryNotFoundError as error:
        if cached_only:
            raise ConfigurationError(
                f"the {name} of {model} is not in this user's cache of the hub; hf download {model} {name}"
            ) from None
        raise _unreachable(model, error, remedy) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _unreachable(model, error, remedy) from None


def _unreachable(model: str, error: Exception, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        f"there is no model {model!r} here, and it could not be read from the hub ({first_line(error)}); {remedy}"
    )
