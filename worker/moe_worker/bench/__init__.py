"""How fast a checkpoint runs on this machine: `moe-worker bench`."""
