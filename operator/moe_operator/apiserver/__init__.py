"""Requests to the Kubernetes API server, for the operator and the frontend.

requests  the connection: sends a request, translates its errors; also what a list-watch asks
answers   classifies error responses
"""
