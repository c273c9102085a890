"""Version 1 of the inference API."""
