"""Imported by every Python process of a test session as it starts: collect garbage less often.

A process that trains imports millions of objects, and a collection looks at all of them: with
Python's thresholds that is a sixth of its CPU time.
"""

import gc

gc.set_threshold(100_000, 20, 100)
