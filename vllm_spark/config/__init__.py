"""Every setting, described once, and where a running vLLM keeps them."""
