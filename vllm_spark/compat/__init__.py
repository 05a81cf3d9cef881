"""The one place that knows vLLM's versions: what is patched, what is overridden, and whether it fits."""
