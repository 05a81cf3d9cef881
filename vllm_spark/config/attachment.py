"""Attaches this project's settings to vLLM's configuration: in its `additional_config`, under the key `spark`.

vLLM copies its configuration in many ways (for a draft model or a multimodal model, for example), and every copy keeps
the values of `additional_config`. They are part of vLLM's compile cache key, as JSON. The settings (addresses, ports,
time-outs) do not change compiled code, so they are an attribute of the entry, which is not in the JSON: another port
causes no recompilation. The entry's items are this project's version and values that do change compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_spark import __version__
from vllm_spark.config.settings import SECTION, SparkConfig
from vllm_spark.errors import ConfigurationError


class SettingsEntry(dict[str, Any]):
    """The value of `additional_config["spark"]`: its items are part of the compile cache key, the settings are not.

    Attributes:
        settings: of this pair; pickled and copied with the entry.
    """

    settings: SparkConfig


def with_entry(additional: Mapping[str, Any] | None) -> dict[str, Any]:
    """`additional` with this project's entry, to which the settings are attached later."""
    return {**(additional or {}), SECTION: {"version": __version__}}


def attach_settings(vllm_config: Any, config: SparkConfig) -> None:
    """Attaches `config` to vLLM's configuration; copies and pickles of that keep it."""
    _set_entry(vllm_config, _entry(vllm_config), config)


def add_to_compile_key(vllm_config: Any, name: str, value: str) -> None:
    """Adds a value of this project that changes compiled code to vLLM's compile cache key."""
    entry = _entry(vllm_config)
    _set_entry(vllm_config, {**entry, name: value}, getattr(entry, "settings", None))


def settings_of(vllm_config: Any) -> SparkConfig:
    """The settings attached to vLLM's configuration, or to the one of which it is a copy.

    Raises:
        ConfigurationError: there are none: this vLLM was not started with `--spark`.
    """
    entry = _entry(vllm_config)
    if not isinstance(entry, SettingsEntry):
        raise ConfigurationError(
            "SparkExecutor was started without settings; use --spark, or LLM(..., additional_config={'spark': {}})"
        )
    return entry.settings


def _entry(vllm_config: Any) -> Any:
    additional = vllm_config.additional_config
    return additional.get(SECTION) if isinstance(additional, dict) else None


def _set_entry(vllm_config: Any, items: dict[str, Any] | None, config: SparkConfig | None) -> None:
    entry: dict[str, Any] = dict(items or {})
    if config is not None:
        entry = SettingsEntry(entry)
        entry.settings = config
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), SECTION: entry}
