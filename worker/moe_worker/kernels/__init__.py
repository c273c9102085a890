"""Operations of the model; reference.py defines the results of all faster ones."""
