"""What can go wrong with the machines, in sentences."""


class CannotRun(Exception):
    """Machines cannot be booted on this host; the message says why, and what to do about it."""


class MachineError(Exception):
    """A machine or a command in it did not do what was asked; the message ends with what they printed last."""
