"""The engine process: scheduling, forward passes, sampling."""
