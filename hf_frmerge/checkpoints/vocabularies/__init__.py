"""Tokenizers of the models of a merge: which tokens they have, and the tokenizer that the output gets."""
