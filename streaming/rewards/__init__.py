"""Reward sources: what an answer is worth, or the reason why nobody knows."""
