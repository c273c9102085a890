"""Operations of the model; reference.py is the readable truth for every faster one."""
