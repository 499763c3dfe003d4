"""Storage of keys and values: sealed segments in a prefix tree, and growing tails.

With MLA the KV of a token in one layer is a single vector: the normalised latent (`kv_lora_rank`
values) followed by the rotated positional key (`qk_rope_head_dim` values).
"""
