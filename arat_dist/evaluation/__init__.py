"""Robust evaluation: attacks in stages, sharded, resumable, with a verdict for every sample."""
