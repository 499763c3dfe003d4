"""Choice of the rows of each step."""
