"""Damaged inputs of every kind that optsg reads, made from seeds, and what happens to them."""
