"""`glmd bench`: measure glmd next to mlx-lm on this machine."""
