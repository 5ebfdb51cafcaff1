"""The data plane: records, the log, stages, rewards, selection, settings, metrics.

Knows records and offsets; knows no Ray, no engine and no optimizer. Imports neither actors nor learner.
Reading order: records, topics, log/protocol, stage, frontier, scorer, selection, selector, audit.
"""
