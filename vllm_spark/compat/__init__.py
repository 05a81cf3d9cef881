"""Compatibility with vLLM's versions: the patches, the overridden methods, and the check that both fit."""
