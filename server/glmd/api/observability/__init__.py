"""Request statistics, access log and tracing."""
