"""Preference data: reading, splitting, and the rendering shared by all stages."""
