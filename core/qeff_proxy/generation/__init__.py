"""QEfficient's ``generation``: says what there is instead."""
