"""Metrics, prediction, calibration of decoding settings, and tagging of datasets."""
