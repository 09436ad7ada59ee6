"""What the commands print for people: tables, units, and sentences about the numbers."""
