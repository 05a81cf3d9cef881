"""Where a running vLLM keeps this project's settings.

vLLM's `additional_config` is part of its compile cache key. None of the settings (addresses, ports, time-outs) changes
compiled code, so they ride on the configuration object itself, and another port compiles nothing anew. In
`additional_config` stand this project's version and what does change compiled code (`tuning.serving`).
"""

from __future__ import annotations

from typing import Any

from vllm_spark.config import SparkConfig
from vllm_spark.errors import ConfigurationError

SECTION = "spark"
_ATTRIBUTE = "spark_config"


def attach_settings(vllm_config: Any, config: SparkConfig) -> None:
    """Makes `config` travel with vLLM's configuration, through pickles too."""
    object.__setattr__(vllm_config, _ATTRIBUTE, config)


def settings_of(vllm_config: Any) -> SparkConfig:
    """The settings that were attached to vLLM's configuration.

    Raises:
        ConfigurationError: none were: this vLLM was not started with `--spark`.
    """
    config = getattr(vllm_config, _ATTRIBUTE, None)
    if isinstance(config, SparkConfig):
        return config
    section = (vllm_config.additional_config or {}).get(SECTION)
    if isinstance(section, dict) and "version" not in section:  # what `configure` leaves there holds no settings
        return SparkConfig.resolve(file=section)
    raise ConfigurationError(
        "SparkExecutor was started without settings; use --spark, or LLM(..., additional_config={'spark': {}})"
    )
