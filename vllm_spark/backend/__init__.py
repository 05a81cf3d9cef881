"""This project's parts of vLLM: platform, communicators, process groups, metrics, logging, status, checks."""
