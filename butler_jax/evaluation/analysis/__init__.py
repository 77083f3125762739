"""How attention moves, and what a row reads, as arrays and pictures."""
