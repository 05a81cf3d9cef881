"""The memory of this machine: what is available, what a start needs, and what stops an engine. Independent of vLLM."""
