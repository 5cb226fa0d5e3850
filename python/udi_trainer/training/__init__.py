"""How a task is trained: its steps, the loop around them, the engine that runs them, the batches that feed them."""
