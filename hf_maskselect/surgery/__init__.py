"""Changes of weights without training: refit after a cut, channel order, merging of adapters."""
