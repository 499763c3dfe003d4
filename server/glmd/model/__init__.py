"""GLM-4.7-Flash over flattened token rows: loading, attention, sampling."""
