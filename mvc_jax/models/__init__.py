"""Networks: plain fields in, arrays out. No file is read or written here."""
