"""What predictions are worth: scores, fusion, similarity of features, and the report of a run."""
