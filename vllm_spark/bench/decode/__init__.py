"""Decode steps of a whole model, with this project's collectives and with vLLM's (`vllm-spark bench decode`)."""
