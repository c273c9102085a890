"""What all commands share.

calling   calls a model: the address, and errors in one sentence
errors    how commands fail: one sentence and an exit code
terminal  prints so that nothing from outside acts on the terminal
console   fits tables to a terminal, a pipe or a file
"""
