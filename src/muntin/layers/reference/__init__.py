"""Slow, obvious versions of every family, in plain loops, which the fast ones are tested against."""
