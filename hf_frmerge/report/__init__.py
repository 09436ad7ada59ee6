"""What a merge did, for a person to look at: figures, and one HTML page."""
