"""What `vllm-spark doctor MODEL` says of a model from its config.json: whether a pair can serve it, and how fast.

Whether its files are on a machine, and fit there, each machine checks itself (`vllm_spark.doctor`).
"""
