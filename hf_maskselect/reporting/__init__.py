"""Reports on a pruned model for people: sparsity report, model card and pictures."""
