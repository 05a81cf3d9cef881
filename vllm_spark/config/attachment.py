"""Where a running vLLM keeps this project's settings: in its `additional_config`, under the name `spark`.

vLLM copies its configuration in many ways (a draft model and a multimodal model each get one of their own), and every
copy keeps the values of `additional_config`. They are part of vLLM's compile cache key, as JSON. None of the settings
(addresses, ports, time-outs) changes compiled code, so they are an attribute of the entry, which JSON does not see:
another port compiles nothing anew. The entry's items are this project's version and what does change compiled code.
"""

from __future__ import annotations

from typing import Any

from vllm_spark.config.settings import SECTION, SparkConfig
from vllm_spark.errors import ConfigurationError


class SettingsEntry(dict[str, Any]):
    """The value of `additional_config["spark"]`: items that are part of the compile cache key, and the settings.

    Attributes:
        settings: of this pair; pickled and copied with the entry.
    """

    settings: SparkConfig


def attach_settings(vllm_config: Any, config: SparkConfig) -> None:
    """Puts `config` into vLLM's configuration, where every copy and pickle of it keeps it."""
    _set_entry(vllm_config, _entry(vllm_config), config)


def add_compiled(vllm_config: Any, name: str, value: str) -> None:
    """Adds to vLLM's compile cache key something of this project that changes compiled code."""
    entry = _entry(vllm_config)
    _set_entry(vllm_config, {**entry, name: value}, getattr(entry, "settings", None))


def settings_of(vllm_config: Any) -> SparkConfig:
    """The settings that were attached to vLLM's configuration, or to what it was copied from.

    Raises:
        ConfigurationError: none were: this vLLM was not started with `--spark`.
    """
    entry = _entry(vllm_config)
    if isinstance(entry, SettingsEntry):
        return entry.settings
    if entry is not None and "version" not in entry:  # an entry with a version held settings once
        return SparkConfig.resolve(file=entry)
    raise ConfigurationError(
        "SparkExecutor was started without settings; use --spark, or LLM(..., additional_config={'spark': {}})"
    )


def _entry(vllm_config: Any) -> Any:
    additional = vllm_config.additional_config
    return additional.get(SECTION) if isinstance(additional, dict) else None


def _set_entry(vllm_config: Any, items: dict[str, Any] | None, config: SparkConfig | None) -> None:
    entry: dict[str, Any] = dict(items or {})
    if config is not None:
        entry = SettingsEntry(entry)
        entry.settings = config
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), SECTION: entry}
