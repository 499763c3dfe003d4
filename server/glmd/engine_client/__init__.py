"""API-process side of the engine: supervision, admission, timeouts and outputs."""
