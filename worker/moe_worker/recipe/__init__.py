"""`moe-worker compress`: a recipe's steps one after the other, resumable, and a report of what each cost."""
