"""The `optsg` command line."""
