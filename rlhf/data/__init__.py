"""Preference data: reading, cleaning, splitting, and rendering with a chat template."""
