"""`vllm-spark trace`: decode steps of a pair that serves, from both ranks' recordings.

`load` sends requests, so that there are steps; `timeline` puts both recordings on the leader's clock and cuts them into
steps; `step_parts`, `chrome_file` and `picture` show them.
"""
