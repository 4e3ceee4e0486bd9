"""Likelihoods of masked diffusion besides its bound: of an unmasking policy, and of the mixture over random orders."""
