"""Helpers that know nothing of models: files, JSON, messages, checks of arguments."""
