"""Generated code of the API between workers and their operator, by version."""
