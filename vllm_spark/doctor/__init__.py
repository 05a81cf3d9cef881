"""What `vllm-spark doctor` looks at: is this machine, and is this pair, as it should be?

Every check reads files of the kernel, or what is installed, and changes nothing. Discovery needs no RDMA library.
"""
