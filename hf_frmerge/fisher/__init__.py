"""Diagonal Fisher information: how much a model's predictions depend on each of its weights."""
