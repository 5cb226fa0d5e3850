"""Evaluation: scores, fusion of modalities, similarity of features, and the report of a run."""
