"""`moe-worker compress`: runs the steps of a recipe, resumably, and reports the cost of each."""
