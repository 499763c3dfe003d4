"""glmd as a background service of one user: launchd on macOS, systemd on Linux."""
