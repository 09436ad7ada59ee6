"""One block of every model in memory: its modules, layers and weights, and the hidden states that run through it."""
