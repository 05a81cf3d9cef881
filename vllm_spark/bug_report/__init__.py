"""What `vllm-spark report` does: one text file for a bug report, without secrets."""
