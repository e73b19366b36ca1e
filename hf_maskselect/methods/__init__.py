"""Pruning methods: when masks come into force, and how the weights train under them. One file a method."""
