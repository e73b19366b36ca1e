"""Learning from a dense teacher: the losses, and how the teacher is loaded."""
