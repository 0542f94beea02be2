"""What at least two of the problems use: schedules, samplers, training, data, images, checkpoints."""
