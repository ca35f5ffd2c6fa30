"""Preference data: reading, cleaning, splitting, and rendering by chat template."""
