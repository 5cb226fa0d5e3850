"""Studies: questions about the trainer, the runs that answer them, and what these say together."""
