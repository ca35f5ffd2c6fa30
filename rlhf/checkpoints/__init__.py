"""Checkpoints of every training stage: on the local disk, in the store, of TRL's trainers.

A killed stage goes on from its newest checkpoint, on this machine or another, and its result is the
same, byte for byte.
"""
