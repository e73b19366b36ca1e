"""Choosing one mask among several candidates at each sparsity level."""
