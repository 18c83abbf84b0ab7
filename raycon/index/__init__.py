"""Floor 1: clustering and neighbour mining; arrays in, arrays out."""
