"""
Attacks on the program: damaged files, failing calls to the system, kills, and two merges in one folder.

`tests/attack/` runs a few seconds of each with a fixed seed, `scripts/attack.py` as many as one wants. All run the
real commands on small checkpoints, in children of a process that has imported what they need.
"""
