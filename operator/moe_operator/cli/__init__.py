"""Commands for people who use a deployment: `moe generate`, `moe tokenize`, `moe status`."""
