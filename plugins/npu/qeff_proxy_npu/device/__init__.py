"""Targets of `qeff-proxy pack`, one module per vendor's tool."""
