"""Flags of the shortest run that has a search."""

SHORT = {
    "max_steps": 8,
    "num_levels": 2,
    "num_candidates": 2,
    "trial_steps": 1,
    "criterion_batches": 2,
    "dense_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
}
FLAGS = [text for name, value in SHORT.items() for text in (f"--{name}", str(value))]
FLAGS += ["--use_cpu", "--disable_tqdm", "1"]
