"""Tuning of vLLM's Triton kernel for experts: test problems, trial compilations, search."""
