"""Problem 1: a conditional DDPM with classifier-free guidance draws MNIST-M and SVHN digits."""
