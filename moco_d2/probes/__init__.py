"""Probes of a backbone: what it has learned, measured by nearest neighbours and linear classifiers."""
