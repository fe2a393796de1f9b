"""Probes of a backbone: what it knows after pretraining, measured by nearest neighbours and linear classifiers."""
