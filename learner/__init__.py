"""The training plane: pairs to weight versions. Imports streaming only; it meets the generators in the log.

Reading order: pairs, batch, losses, policy, engine, train, checkpoint, publisher.
"""
