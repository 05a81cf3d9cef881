"""Parameters of vLLM's kernels: tables, what is valid, which one a launch gets, checks."""
