"""`vllm-spark demo`: compares the tokens of a pair with those of one stock rank on the same tiny model.

What is started is what a user types: `vllm-spark join` and `vllm serve MODEL --spark`. Afterwards one stock rank
(`vllm serve MODEL`) answers the same prompts, and the token ids must be equal. One server at a time, so that two
cores are enough.
"""
