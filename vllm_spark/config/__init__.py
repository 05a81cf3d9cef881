"""The settings of vllm_spark, and how they are attached to vLLM's configuration."""
