"""Merging in function space: fit the layers of a merge to what its experts compute on a few prompts."""
