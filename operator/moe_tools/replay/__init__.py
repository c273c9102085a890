"""Compares scaling policies on a recorded trace in a simulated service."""
