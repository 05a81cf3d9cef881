"""What a pair consists of and what it does now, for the leader's start table and for `vllm-spark status`."""
