"""Report on a merge: figures, and one HTML page."""
