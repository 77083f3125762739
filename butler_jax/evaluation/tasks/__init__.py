"""The tasks that measure policies."""
