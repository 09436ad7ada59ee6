"""Texts for users: titles, sentences and verdicts, shared by terminal, model card and report."""
