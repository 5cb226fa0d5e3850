"""Studies: questions about the trainer, the runs that answer them, and the summaries of these runs."""
