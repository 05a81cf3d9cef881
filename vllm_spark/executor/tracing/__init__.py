"""Traces of steps: has both ranks record their steps, and compares their clocks over the channel.

The API server asks the leader's engine (`leader`), and the leader asks the follower (`follower`) by three calls. All of
that runs between two steps, in the thread that runs the model, so both ranks record the same steps.
"""
