"""What people read about a pruned model: sparsity report, model card and plots."""
