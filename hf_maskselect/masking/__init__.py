"""What is zero: targets, scores, patterns, schedules and mask sets. Knows torch (and safetensors, to save) and nothing
of transformers, so that it can be lifted out."""
