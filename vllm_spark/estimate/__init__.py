"""Predicts a decode step of a model on one machine and on two, from its config.json: `vllm-spark estimate`.

A step is a list of kernels (`step.py`); a kernel takes its start and its bytes over the memory's bandwidth (`gpu.py`).
"""
