"""Generated code of the inference API, by version."""
