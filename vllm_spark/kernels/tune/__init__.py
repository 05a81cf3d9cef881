"""What `vllm-spark tune` does: plan, search, timing, journal, results."""
