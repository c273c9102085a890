"""Choosing tokens and turning them into text. The parameters and the text side import no torch."""
