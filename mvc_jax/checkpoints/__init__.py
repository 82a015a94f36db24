"""Files in the formats of other libraries: found, checked, read and written."""
