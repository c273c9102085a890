"""What would have happened: a recorded trace, a simulated service, and scaling policies beside each other."""
