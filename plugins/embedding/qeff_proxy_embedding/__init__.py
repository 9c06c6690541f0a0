"""Embedding models for qeff-proxy: one module for each family, found through an entry point."""
