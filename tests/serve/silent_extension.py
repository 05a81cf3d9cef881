"""A vLLM worker extension for tests: the engine does not answer the first question of the API server.

SILENT: whether the process then is "killed", as by the kernel when memory has run out, or only "hangs".
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from vllm.v1.engine.core import EngineCore

HANG_SECONDS = 120.0


def be_silent(self: EngineCore) -> Any:
    """Ends the process without an answer, or gives none for long."""
    if os.environ["SILENT"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("The engine has been asked for its tasks.", flush=True)
    time.sleep(HANG_SECONDS)


EngineCore.get_supported_tasks = be_silent


class Silent:
    """Adds nothing."""
