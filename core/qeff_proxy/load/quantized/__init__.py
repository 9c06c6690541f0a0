"""Weights that a checkpoint stores as codes and scales, by the method that quantized them.

A module a format: its ``weights_of`` finds the tensors that belong together, checks them, and gives
the weights that they stand for. Only what the method quantized is replaced. The weights have the
dtype in which the format's own implementation computes them.
"""
