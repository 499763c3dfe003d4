"""Request statistics, the access log and tracing."""
