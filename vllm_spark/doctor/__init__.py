"""The checks of `vllm-spark doctor`, of one machine and of the pair.

Every check reads files of the kernel, or what is installed, and changes nothing. Discovery needs no RDMA library.
"""
