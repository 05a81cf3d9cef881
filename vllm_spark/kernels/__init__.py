"""Parameters of vLLM's kernels: their tables, rules, look-up and checks."""
