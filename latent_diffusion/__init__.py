"""The frozen latent diffusion that both editions of problem 3 steer."""
