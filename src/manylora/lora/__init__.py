"""This room holds the adapter: one contiguous vector, its layout, and the layers that read it.

Owns: sites and targets, the layout, the adapter's vectors, initial factors, the wrapped linear
layers, and the routing table that tells each token's adapter.
Does not own: the base model (models), losses, optimizer arithmetic, files.
Talks to: models and kernels below; engine, sampling and checkpoint use it.
"""
