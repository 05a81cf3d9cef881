"""Entry points for vLLM and users: the plugin, the command line, `vllm serve --spark` and `vllm-spark join`."""
