"""Floor 0: the words everyone speaks. Imports nothing of raycon above it."""
