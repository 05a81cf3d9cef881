"""The patches of vLLM, one in each file; `vllm_spark.compat.patching` describes the format."""
