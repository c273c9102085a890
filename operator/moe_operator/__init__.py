"""The operator and the API that it serves. No torch in here."""
