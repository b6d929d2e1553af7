"""Load generator: agents that reason, act and reflect, driven at the times a workload says.

Raw events go to ``requests.jsonl`` first and every report is computed from them, so that a run can
be read again in another way without running it again.
"""
