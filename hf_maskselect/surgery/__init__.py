"""Changes to weights that need no training: refit, channel permutation, adapter merge."""
