"""Training of one task: its step, the loop, the engine that runs steps, the batches, and inference."""
