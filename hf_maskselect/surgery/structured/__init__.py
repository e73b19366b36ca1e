"""Smaller models: layers, neurons and heads removed, and the rest fitted by least squares."""
