"""Generate token ids from a compiled proxy, with the loop of transformers."""
