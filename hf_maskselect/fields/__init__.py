"""The fields of `PruningConfig`, by topic, each with the rules for its values."""
