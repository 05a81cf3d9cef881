"""QEMU's monitor: one command and its answer, as lines of JSON."""

from __future__ import annotations

import json
import socket
from typing import Any

from .errors import MachineError

ANSWER_SECONDS = 60.0


class Monitor:
    """The monitor of one machine, on a connected socket that it takes over."""

    def __init__(self, connection: socket.socket, machine: str) -> None:
        connection.settimeout(ANSWER_SECONDS)
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")
        self._machine = machine
        self._greeted = False

    def execute(self, command: str, **arguments: Any) -> None:
        """Runs a command of QEMU's machine protocol.

        Raises:
            MachineError: QEMU refuses it, or does not answer within a minute.
        """
        if not self._greeted:
            self._exchange("qmp_capabilities", {})
            self._greeted = True
        self._exchange(command, arguments)

    def _exchange(self, command: str, arguments: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            for line in self._lines:
                answer = json.loads(line)
                if "return" in answer:
                    return
                if "error" in answer:
                    raise MachineError(f"QEMU of {self._machine} refuses {command}: {answer['error']['desc']}")
        except OSError as error:
            raise MachineError(f"QEMU of {self._machine} did not answer to {command}: {error}") from error
        raise MachineError(f"QEMU of {self._machine} ended during {command}")
