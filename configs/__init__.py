"""Tuned parameters of kernels and configurations of models, each with where it came from."""
