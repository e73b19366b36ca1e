"""What is written to disk and read back: weights, pruning state and packed files."""
