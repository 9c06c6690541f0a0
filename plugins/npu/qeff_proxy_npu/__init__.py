"""Backends for NPUs, found through entry points, and the fixed shapes that they compile."""
