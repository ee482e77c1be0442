"""Isolator: a sidecar-free layer-7 firewall for containers."""

__version__ = "0.1.0"
