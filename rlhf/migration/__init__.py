"""Configurations from the arguments of other tools: AITraining, and TRL up to 1.12."""
