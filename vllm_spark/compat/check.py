"""Whether the installed vLLM is one that `--spark` works with: by what its sources are, not by what it calls itself.

Nightlies, builds from source and NVIDIA's containers have versions of many forms. What this project changes in vLLM
(required patches) and what it overrides (hooks) must be as it knows it; then any version is accepted.
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
    """Makes sure that a vLLM is installed with which `--spark` works; warns of one that nobody has tried.

    Reads source files for some tenths of a second the first time; imports nothing.

    Raises:
        ConfigurationError: none is installed, or a place in it that `--spark` needs is not as this project knows it.
    """
    version = installed_vllm()
    if version is None:
        raise ConfigurationError(f"vLLM is not installed; install vLLM {SUPPORTED} for this machine (pip install vllm)")
    misfits = required_mismatches()
    if misfits:
        symbol, problem = misfits[0]
        more = f" (and {len(misfits) - 1} more)" if misfits[1:] else ""
        raise ConfigurationError(
            f"--spark does not work with vLLM {version}: {symbol}{more} {problem}; install a vLLM of {SUPPORTED}, or a "
            "version of vllm-spark that knows this one (vllm-spark patches shows all that it needs)"
        )
    if not is_tested(version):
        changed = [_name(hook.anchor) for hook in HOOKS if _problem(hook.anchor, frozenset(hook.fingerprints))]
        also = f"; its source differs in {', '.join(changed)}" if changed else ""
        logger.warning(
            "vllm_spark was tested with vLLM %s, and vLLM %s is installed, which has all that it needs%s.",
            SUPPORTED,
            version,
            also,
        )


@functools.cache
def required_mismatches() -> tuple[tuple[str, str], ...]:
    """The places without which there is no `--spark` and that are not as it knows them: name, and what is wrong."""
    needed = [(patch.anchor, frozenset(patch.fingerprints)) for patch in all_patches() if patch.required]
    # A changed body is read by a person before a version counts as tested; a changed signature breaks an override.
    needed += [(hook.anchor, frozenset(hook.fingerprints)) for hook in HOOKS if hook.anchor.scope == "signature"]
    found = ((anchor, _problem(anchor, known)) for anchor, known in needed)
    return tuple((_name(anchor), problem) for anchor, problem in found if problem)


def _problem(anchor: Anchor, known: frozenset[str]) -> str | None:
    source = installed_source(anchor.module)
    fingerprint = None if source is None else anchor.fingerprint(source)
    if fingerprint is None:
        return "is not there"
    if fingerprint in known:
        return None
    return f"is not as this version of vllm-spark knows it (fingerprint {fingerprint})"


def _name(anchor: Anchor) -> str:
    return f"{anchor.module}:{anchor.qualified_name}"
