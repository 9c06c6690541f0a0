"""Building blocks for plugin authors: the generic plugin, decoders, masks, tokenizing."""
