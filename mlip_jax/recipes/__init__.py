"""The training recipes that the files in `configs/` start from."""
