"""qeff-proxy: proxy models of transformers, for people who bring them to accelerators."""
