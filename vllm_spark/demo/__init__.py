"""What `vllm-spark demo` shows: a pair and one stock rank with the same tiny model, and whether their tokens agree.

What is started is what a user types: `vllm-spark join` and `vllm serve MODEL --spark`. Afterwards one stock rank
(`vllm serve MODEL`) answers the same prompts, and the token ids must be equal. One server at a time, so that two
cores are enough.
"""
