"""How attention changes from step to step, and what a row reads, as arrays and pictures."""
