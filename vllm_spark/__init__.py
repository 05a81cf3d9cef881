"""Serve one vLLM model on a pair of GB10 machines."""

__version__ = "0.1.0"
