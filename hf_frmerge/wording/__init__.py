"""What people read: every title, sentence and verdict once, for terminal, card and page."""
