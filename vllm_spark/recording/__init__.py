"""Recording decode steps on both ranks of a pair: what each does when, for `vllm-spark trace`.

A rank records only between `Recorder.start` and its end, which it reaches by itself. Before and after, nothing of this
package runs: functions are replaced by recording ones at the start, and put back at the end.
"""
