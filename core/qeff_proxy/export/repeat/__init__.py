"""Trace one layer of each kind and repeat it in the graph."""
