"""Routes beside the generating APIs: health, models, tokenize, status, metrics."""
