"""What vLLM and users start: the plugin, the command line, `vllm serve --spark` and `vllm-spark join`."""
