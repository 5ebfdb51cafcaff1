"""The training plane: pairs to weight versions. Imports streaming only; it meets the generators in the log.

Reading order: pairs, batch, losses, policy, engine, trainer (what all ranks do), lead (what rank 0 decides), train
(the role), checkpoint, publisher.
"""
