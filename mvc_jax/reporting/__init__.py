"""Pages that show what was made and measured, for people."""
