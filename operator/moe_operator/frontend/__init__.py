"""The router in front of the leaders of a deployment; it needs no torch."""
