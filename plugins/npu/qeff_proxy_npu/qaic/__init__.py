"""Qualcomm Cloud AI, through ``qaic-compile`` where it is installed."""
