"""The operator and the API that it serves. No torch in here."""

import os

# Before anything imports numpy: more threads triple the CPU time of forecasts, whose matrices are small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
