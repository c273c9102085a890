"""The API server: a client, the mirror that watches keep, and the peering of operators. Decides nothing."""
