"""What all commands share.

endpoint  where a model is called: the address, TLS, the credential
calling   calls a model; errors in one sentence
errors    how commands fail: one sentence and an exit code
terminal  prints so that nothing from outside acts on the terminal
console   fits tables to a terminal, a pipe or a file
"""
