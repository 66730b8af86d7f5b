"""Data collation, the cache of tower features, and files that are written atomically."""
