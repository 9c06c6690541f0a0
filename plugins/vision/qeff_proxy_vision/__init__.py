"""Vision-language models for qeff-proxy. No family is served yet."""
