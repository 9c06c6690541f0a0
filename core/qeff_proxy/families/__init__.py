"""What plugin authors build on: the generic plugin, decoders, masks, tokenizing."""
