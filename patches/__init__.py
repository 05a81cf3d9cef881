"""Every change of vLLM for which it has no hook, one a file; `vllm_spark.compat.patching` says what a file has."""
