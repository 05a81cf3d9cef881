"""`python -m vllm_spark`: the command `vllm-spark`, also where its script is not on the path."""

import sys

from vllm_spark.cli import main

if __name__ == "__main__":
    sys.exit(main())
