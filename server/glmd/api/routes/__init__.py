"""Routes that belong to neither API: health, models, tokenize, status, metrics."""
