"""A plugin for qeff-proxy, with an architecture that transformers does not know."""
