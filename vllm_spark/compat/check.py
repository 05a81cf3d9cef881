"""Checks that `--spark` supports the installed vLLM: by its sources, not by its version string.

Nightlies, builds from source and NVIDIA's containers have versions in many formats. The functions that this project
changes (required patches) and overrides (hooks) must have known fingerprints; then any version is accepted.
"""

from __future__ import annotations

import functools
import logging

from vllm_spark.compat.hooks import HOOKS
from vllm_spark.compat.patching import Anchor, all_patches, installed_source
from vllm_spark.compat.versions import SUPPORTED, installed_vllm, is_tested
from vllm_spark.errors import ConfigurationError

logger = logging.getLogger("vllm_spark")


def check_vllm() -> None:
    """Checks that the installed vLLM supports `--spark`; warns if its version is untested.

    Reads source files for some tenths of a second the first time; imports nothing.

    Raises:
        ConfigurationError: vLLM is not installed, or a function that `--spark` needs is missing or has changed.
    """
    version = installed_vllm()
    if version is None:
        raise ConfigurationError(f"vLLM is not installed; install vLLM {SUPPORTED} for this machine (pip install vllm)")
    mismatches = required_mismatches()
    if mismatches:
        symbol, problem = mismatches[0]
        more = f" (and {len(mismatches) - 1} more)" if mismatches[1:] else ""
        raise ConfigurationError(
            f"--spark does not work with vLLM {version}: {symbol}{more} {problem}; install a vLLM of {SUPPORTED}, or a "
            "version of vllm-spark that supports this one (vllm-spark patches lists what it needs)"
        )
    if not is_tested(version):
        changed = [_name(hook.anchor) for hook in HOOKS if _problem(hook.anchor, frozenset(hook.fingerprints))]
        also = f"; its source differs in {', '.join(changed)}" if changed else ""
        logger.warning(
            "vllm_spark was tested with vLLM %s; vLLM %s is installed, and has everything that it needs%s.",
            SUPPORTED,
            version,
            also,
        )


@functools.cache
def required_mismatches() -> tuple[tuple[str, str], ...]:
    """The functions that `--spark` needs and that are missing or have changed: name and problem."""
    needed = [(patch.anchor, frozenset(patch.fingerprints)) for patch in all_patches() if patch.required]
    # A changed signature breaks an override; a changed body is reviewed before a version counts as tested.
    needed += [(hook.anchor, frozenset(hook.fingerprints)) for hook in HOOKS if hook.anchor.scope == "signature"]
    found = ((anchor, _problem(anchor, known)) for anchor, known in needed)
    return tuple((_name(anchor), problem) for anchor, problem in found if problem)


def _problem(anchor: Anchor, known: frozenset[str]) -> str | None:
    source = installed_source(anchor.module)
    fingerprint = None if source is None else anchor.fingerprint(source)
    if fingerprint is None:
        return "does not exist"
    if fingerprint in known:
        return None
    return f"has changed (fingerprint {fingerprint})"


def _name(anchor: Anchor) -> str:
    return f"{anchor.module}:{anchor.qualified_name}"
