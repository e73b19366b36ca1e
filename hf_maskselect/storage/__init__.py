"""Files on disk: saved weights, the pruning state beside them, and packed models."""
