"""Where a model's configuration comes from: a folder, a file, this project's own, or the hub."""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.models.weights import OTHER_QUANTIZATION_FILES, check_quantization_is_in_config, quantization_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""As the hub names models: of an owner, and not a path."""


def read_model_config(model: str) -> tuple[str, dict[str, Any]]:
    """Its name, and the content of its config.json: from a folder, a file, this project's, or the hub.

    Raises:
        ConfigurationError: there is none, it is no JSON object, or it does not say how the weights are quantized.
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
        path = _from_hub(model, "config.json", remedy)
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} holds no JSON object, as a config.json does")
    if path.name == "config.json":
        if on_hub and not quantization_of(config):
            for name in OTHER_QUANTIZATION_FILES:
                with suppress(ConfigurationError):  # it has none
                    _from_hub(model, name, remedy)
        check_quantization_is_in_config(config, path.parent)
    return (path.parent.name if path.name == "config.json" and path.parent.parent == shipped else model), config


def _from_hub(model: str, name: str, remedy: str) -> Path:
    """The file `name` of a model that vLLM would load by this name."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigurationError(f"there is no model {model!r} here; {remedy}") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it retries for half a minute, and logs each time
    try:
        return Path(hf_hub_download(model, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"there is no model {model!r} here, and the hub gave none ({reason}); {remedy}"
        ) from None
