"""Other people's files: found, recognised, read and written."""
