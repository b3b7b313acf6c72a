"""Inference servers: batching, version fencing, engines."""
