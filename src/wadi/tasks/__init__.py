"""What people do with a one-step student."""

from wadi.tasks.high_resolution import growth, redilated

__all__ = ["growth", "redilated"]
