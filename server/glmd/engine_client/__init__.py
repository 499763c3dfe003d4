"""The API process's side of the engine."""
