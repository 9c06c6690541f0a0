"""Backends: what runs a part. One module each, imported on first use."""
