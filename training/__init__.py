"""Training: loss, optimizers, checkpoints, the folder of a run, and the loop."""
