"""The API server: a client, the watch cache, and the peering of operators. Makes no decisions."""
