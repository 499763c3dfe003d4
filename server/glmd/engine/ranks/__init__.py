"""Tensor parallelism: one model over several processes, of which rank 0 decides.

Rank 0 is the engine. The other ranks repeat what its executor, tail pool and segments do, on their
parts of the weights and on KV of their own.
"""
