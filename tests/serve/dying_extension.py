"""A vLLM worker extension for tests: rank 1 dies when its worker is made, right before the ranks' process groups."""

from __future__ import annotations

import os
import signal

if os.environ.get("RANK") == "1":
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """Never reached on rank 1."""
