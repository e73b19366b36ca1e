"""The parts of `PruningTrainer` that are not about masks: checkpoints, plan, checks, Hub."""
