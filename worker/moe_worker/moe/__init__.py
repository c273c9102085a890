"""Routing tokens to experts, and the experts themselves."""
