"""The entry point that vLLM's plugin mechanism calls, in every process of vLLM."""

from __future__ import annotations

import logging
import os


def register() -> None:
    """vLLM's general plugin: installs the patches for `--spark`, to be applied when vLLM imports their modules.

    Imports only a few modules of this package, in some milliseconds, and never raises: without `--spark`, vLLM must
    work as if this package were not installed.
    """
    try:
        from vllm_spark.compat.patching import ANNOUNCED, apply_all, watch_imports

        watch_imports()
        if ANNOUNCED in os.environ:  # one of several API servers of a pair
            apply_all("leading")
    except Exception:
        logging.getLogger("vllm_spark").exception("vllm_spark could not be registered; vLLM continues without it.")
