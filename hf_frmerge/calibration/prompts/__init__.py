"""What a merge is fitted to: prompts that are given, or that the experts write."""
