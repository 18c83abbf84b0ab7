"""Floor 4: the only folder inside raycon/ that imports ray."""
