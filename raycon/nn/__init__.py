"""Floor 1: pure PyTorch parts."""
