"""What vLLM loads by itself, in every process that it starts."""

from __future__ import annotations

import logging
import os


def register() -> None:
    """vLLM's general plugin: teaches it the flag `--spark` and what that means.

    Loads nothing but a few modules of this package, in some milliseconds, and never raises: a vLLM that is used without
    `--spark` must not notice that this package is installed.
    """
    try:
        from vllm_spark.compat.patching import ANNOUNCED, apply_all, watch_imports

        watch_imports()
        if ANNOUNCED in os.environ:  # one of several API servers of a pair
            apply_all("leading")
    except Exception:
        logging.getLogger("vllm_spark").exception("vllm_spark could not be registered; vLLM goes on without it.")
