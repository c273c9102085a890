"""What caches would have saved on a recorded trace: `moe replay --cache`. Pure."""
