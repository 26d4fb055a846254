"""moebench: mixture-of-experts systems side by side, and papers' claims checked."""

__version__ = "0.1.0"
