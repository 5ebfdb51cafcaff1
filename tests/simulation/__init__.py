"""A run in one thread: the real roles, over a log in memory, in an order and with faults that a seed decides.

    seed -> plan (settings, fault rates) -> world: one step of one role at a time -> healed -> drained -> checked

What is real: scheduler, generator, scorer, selector and learner with all their parts, checkpoints and weight files.
What is simulated: the log, time, threads, the engine that samples, the sources of rewards, the arithmetic of a step.

Reading order: fibers (who runs when), memory_log, parts, roles, schedule (a seed's whole life), broken (rules that are
broken on purpose, to see the simulation find it).
"""
