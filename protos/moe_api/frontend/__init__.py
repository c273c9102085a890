"""Generated code of the API between frontends and their operator, by version."""
