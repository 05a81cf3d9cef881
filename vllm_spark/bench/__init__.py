"""Benchmarks of collectives, decode steps and the wire, compared with what vLLM uses without this project."""
