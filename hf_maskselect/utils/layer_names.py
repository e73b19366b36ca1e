"""Take the names of weights apart: which layer, and which matrix of it."""


def layer_of(name: str) -> tuple[str, str, str]:
    """Split the name of a weight into its stack, the number of its layer and its matrix.

    Stack and number are empty outside of layers. A number that begins the name counts only if there is no other.
    """
    plain = name.removesuffix(".weight")
    parts = plain.split(".") if plain != name else []
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdecimal() and len(part) < 10]
    if not numbers:
        return "", "", plain
    place = next((place for place in numbers if place), 0)
    return "".join(f"{part}." for part in parts[:place]), parts[place], ".".join(parts[place + 1 :])
