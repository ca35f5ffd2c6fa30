"""Stages as retriable Prefect tasks; references become folders and folders references here."""
