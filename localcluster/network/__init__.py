"""The node's network agent: cluster DNS, service addresses and forwards from the host."""
