"""Floor 3: the loop and its surroundings, without Ray."""
