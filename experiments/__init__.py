"""Experiments that reproduce results of the paper; not part of the installed packages."""
