"""Version 1 of the frontend API."""
