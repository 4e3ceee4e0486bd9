"""Text generation: requests, sampling, next-token prediction with a KV cache, and masked diffusion."""
