"""Learning from a dense teacher: its loading and checks, and the losses."""
