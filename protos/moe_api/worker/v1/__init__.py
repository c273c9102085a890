"""Version 1 of the worker API."""
