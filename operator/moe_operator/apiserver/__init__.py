"""Requests to the Kubernetes API server, for the operator and the frontend.

requests  the connection: sends requests, also those of a list-watch, and translates their errors
answers   classifies error responses
"""
