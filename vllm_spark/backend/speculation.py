"""Checks of vLLM's settings for speculation, beyond those of `support`."""

from __future__ import annotations

import logging
from typing import Any

from vllm_spark.config.settings import FLAG
from vllm_spark.errors import ConfigurationError
from vllm_spark.ranks import WORLD_SIZE

logger = logging.getLogger("vllm_spark")

_ON_BOTH_RANKS = ("eagle", "eagle3", "mtp", "dflash", "medusa")
"""Methods whose drafts use the target's tensor-parallel group, whatever the setting says."""


def check_draft_ranks(vllm_config: Any) -> None:
    """Checks on how many ranks the draft is to run.

    vLLM refuses a separate draft model on one of several ranks, but only in its workers, once the target is loaded. It
    ignores the setting for drafts of `_ON_BOTH_RANKS`.

    Raises:
        ConfigurationError: a separate draft model was requested on one rank.
    """
    speculative = vllm_config.speculative_config
    ranks = getattr(speculative, "draft_tensor_parallel_size", None)
    if ranks in (None, WORLD_SIZE):
        return
    setting = f"draft_tensor_parallel_size {ranks} of --speculative-config"
    if speculative.method == "draft_model":
        raise ConfigurationError(
            f"{setting} cannot be used with {FLAG}: vLLM runs a draft model on the ranks of its target, half of it on "
            "each; leave it out"
        )
    if speculative.method in _ON_BOTH_RANKS:
        logger.info("%s has no effect: vLLM runs drafts of the method %s on both ranks.", setting, speculative.method)
