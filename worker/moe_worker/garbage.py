"""Python's garbage collection, in processes that must not stand still."""

import gc

# Collections of young objects before a full one in an engine; Python's default is 10.
RARELY = 200


def spare_loaded() -> None:
    """Leaves what exists now out of later collections.

    With torch loaded a full one visits 200,000 objects in 0.1 s, some seconds apart under load. All streams
    wait meanwhile, and in a mesh those of all ranks.
    """
    gc.collect()
    gc.freeze()


def collect_rarely() -> None:
    """Makes full collections rare, for an engine: later objects are many, too.

    The prefix cache has two for each page; 90 GB of a model of 27 layers are 180,000 pages, and a full
    collection visits them in 0.2 s. They are freed when nothing refers to them; only cycles wait for one.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, RARELY)
