"""How a compressed model runs: modules that keep their weights packed, and the operators under them."""
