"""The API server: reading a deployment's objects, and carrying out a plan. Decides nothing."""
