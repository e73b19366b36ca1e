"""Who decides what is zero, and when: one file a method."""
