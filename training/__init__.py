"""What a training run is made of: loss, optimizers, checkpoints, its folder, and the loop."""
