"""What vLLM loads by itself, in every process that it starts."""

from __future__ import annotations

import logging


def register() -> None:
    """vLLM's general plugin: teaches it the flag `--spark` and what that means.

    Loads neither torch nor the native module, and never raises: a vLLM that is used without `--spark` must not
    notice that this package is installed.
    """
    try:
        from vllm_spark.patches import apply_all

        apply_all()
    except Exception:
        logging.getLogger("vllm_spark").exception("vllm_spark could not be registered; vLLM goes on without it.")
