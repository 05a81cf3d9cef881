"""What is installed: vLLM, the changes to it, and the shared secret."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vllm_spark.compat.check import check_vllm
from vllm_spark.compat.patching import all_patches, state_of
from vllm_spark.compat.versions import SUPPORTED, installed_vllm
from vllm_spark.config.settings import SECRET_VARIABLE, SparkConfig
from vllm_spark.doctor.finding import Finding
from vllm_spark.errors import ConfigurationError, upper_first
from vllm_spark.executor.channel.secret import default_secret_file, load_secret, secret_is_there
from vllm_spark.variables import find_variable, old_name

PLUGIN = "spark"
"""The name under which vLLM finds this project's plugin (pyproject.toml)."""

_ANYWHERE = "192.0.2.1"  # an address of no machine, but none of the loopback's either


def check_software(config: SparkConfig, *, secret_needed: bool) -> Iterator[Finding]:
    """All of this module. `secret_needed` is False on a machine that has no link to another one."""
    yield _vllm()
    if installed_vllm() is not None:
        yield _patches()
        yield from _plugins()
    yield _secret(config, secret_needed)


def _vllm() -> Finding:
    title = "vLLM"
    try:
        check_vllm()
    except ConfigurationError as error:
        sentence, _, remedy = str(error).partition("; ")
        return Finding(
            "software.vllm",
            title,
            "problem",
            str(installed_vllm() or "not installed"),
            f"{upper_first(sentence)}. vLLM {SUPPORTED} works.",
            upper_first(remedy),
        )
    return Finding("software.vllm", title, "ok", str(installed_vllm()))


def _patches() -> Finding:
    title = "Changes to vLLM"
    states = [(patch, state_of(patch)) for patch in all_patches()]
    unfit = [(patch, state) for patch, state in states if state not in ("ready", "applied")]
    if not unfit:
        return Finding("software.patches", title, "ok", f"{len(states)} of {len(states)} fit")
    lost = "; ".join(f"{patch.feature} ({patch.name}: {state})" for patch, state in unfit)
    return Finding(
        "software.patches",
        title,
        "warning",
        f"{len(states) - len(unfit)} of {len(states)} fit",
        f"This vLLM's source is not one that vllm_spark knows at these places, so it cannot offer: {lost}.",
        "vllm-spark patches   # what they are",
    )


def _plugins() -> Iterator[Finding]:
    """A variable of vLLM's that lists the plugins to load, if it leaves this one out."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return
    yield Finding(
        "software.plugins",
        "Plugins of vLLM",
        "problem",
        f"VLLM_PLUGINS={allowed}",
        f"vLLM loads these plugins alone, so on a leader it does not know --spark ({PLUGIN} is missing).",
        f"unset VLLM_PLUGINS   # or add {PLUGIN} to it",
    )


def _secret(config: SparkConfig, needed: bool) -> Finding:
    title = "Shared secret"
    try:
        load_secret(config, _ANYWHERE)
    except ConfigurationError as error:
        sentence, _, remedy = str(error).partition("; ")
        default = default_secret_file()
        given = config.secret_file or any(map(os.environ.get, (SECRET_VARIABLE, old_name(SECRET_VARIABLE))))
        absent = not given and not (default and secret_is_there(default))
        if absent and not needed:
            return Finding(
                "software.secret", title, "not applicable", "none", "Both ranks on one machine need none from you."
            )
        return Finding(
            "software.secret",
            title,
            "problem",
            "none" if absent else "unusable",
            "Both machines need the same one." if absent else f"{upper_first(sentence)}.",
            "vllm-spark doctor --make-secret   # on one machine; then copy it to the other" if absent else remedy,
        )
    variable = find_variable(SECRET_VARIABLE)
    where = variable.name if variable else config.secret_file or default_secret_file()
    return Finding("software.secret", title, "ok", f"in {where}")
