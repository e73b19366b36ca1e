"""What was measured on the way to a shape, so that an interrupted search finds it again and makes the same choice."""

from collections.abc import MutableMapping

Notes = MutableMapping[str, float]  # what was measured -> its value; a dict, or one that writes itself to a file
