"""Text models for qeff-proxy: one module per family, each found through an entry point."""
