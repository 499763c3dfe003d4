"""Quality of checkpoints against a reference, and the search for recipes."""
