"""A run of real processes that is cheap: the real roles on a real log, and nothing that takes seconds to start.

    plan (a seed's) -> every role a process -> killed, stopped, poisoned, in another time -> end of the data -> checked

What is real: processes and signals, the log (SQLite, or Kafka with a user per role), scheduler, generator, scorer,
selector and learner with DeepSpeed, checkpoints, weight files. What stands in: the engine that samples, and the
reference model. Processes are forked from one that has imported everything, so that a start costs no second.

Reading order: fates (what happens to a process), parts, process (one role), plan, run (all of them), verdict.
"""
