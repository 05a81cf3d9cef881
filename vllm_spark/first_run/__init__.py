"""`vllm-spark doctor --first-run`: runs all that the product needs on both machines, one part after the other.

The order is such that the first step that fails names the fault. Everything is written to one report file.
"""
