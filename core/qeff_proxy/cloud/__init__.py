"""QEfficient's programs ``cloud.export``, ``compile``, ``execute`` and ``infer``."""
