"""Settings of every Python process of a test session, which imports this as it starts."""

import gc
import sys

# A process that trains imports millions of objects, and each collection looks at all of them: with
# Python's own thresholds a sixth of its CPU time.
gc.set_threshold(100_000, 20, 100)
# Some containers set PYTHONDONTWRITEBYTECODE: each process would compile rlhf anew.
sys.dont_write_bytecode = False
