"""Who is told a run's numbers beside its own folder, and why none of them can hurt the run.

    journal ──► listener ──► a bounded queue a sink ──► its thread ──► TensorBoard's files
                                                               └────► a process of its own ──► wandb, mlflow, trackio

    opening.py    from a [sinks] table to sinks         feed.py       a sink's thread and queue
    listener.py   what of the journal they are told     process.py    a client in a process that can be ended
    sink.py       the one protocol                      __main__.py   that process

Each client is known to its own file alone, and imported when it is used. Nothing here is needed for a run to be whole.
"""
