"""Publication of weights: message, publisher, canary."""
