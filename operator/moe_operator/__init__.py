"""The operator, the router in front of the workers, and the command-line client. No torch in here."""
