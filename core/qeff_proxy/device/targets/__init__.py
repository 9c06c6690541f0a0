"""The core's targets, one module each: what differs from tool to tool, and nothing else."""
