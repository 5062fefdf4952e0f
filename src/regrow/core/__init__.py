"""Floor 1: the nouns. Every other folder is written in these words.

* `Topology`: which entries of one weight are active; immutable, with exact integer counts
* `SparseWeight`: one weight with its topology, values, gradients and state, whatever storage holds it
* `Score`: how much each active entry deserves to stay, weight -> (nnz,)
* `Field`: a value for every position, read block by block; what growth ranks
* `Growth`: where entries appear, (weight, taken, count) -> positions
* `Allocation`: how many entries each weight gets, (weights, scores, total) -> counts
* `Schedule`: a number over optimizer steps, step -> float (in `regrow.parts.schedules`)
* `Method`: a start, updates and what they need, under one name; composed, never subclassed

The verb is `SparseWeight.rewire`, the only way in which training changes a topology: survivors keep value and optimizer
state, newcomers start at zero. Two updates carry most methods, `prune` and `drop_and_grow`; `every` says when. RigL:

    >>> from regrow.parts import *
    >>> moves = drop_and_grow(cosine(0.3, until=24_000), lowest(magnitude), highest(gradient))
    >>> rigl = Method(
    ...     "rigl",
    ...     start=random_topology(0.1, erk),
    ...     update=every(100, moves, until=24_000),
    ...     timing="instead",
    ...     needs=Need.GRADIENT,
    ... )
    >>> rigl.due(100), rigl.due(150), rigl.due(24_000)
    (True, False, False)

GraNet is gradual pruning chained with RigL's drop and grow, here from a dense network:

    >>> ramp = prune(cubic(1.0, 0.1, until=12_000), magnitude, globally)
    >>> update = chain(every(100, ramp, until=12_000), every(100, moves, until=24_000))
    >>> granet = Method("granet", dense(), update, timing="after", needs=Need.GRADIENT | Need.DENSE_VALUES)
    >>> [len(granet.update), granet.due(12_000)]
    [2, True]

SNIP prunes once, by a score that needs one gradient, and never updates:

    >>> snip = Method("snip", by_score(0.1, saliency, globally, needs_gradient=True))
    >>> snip.start.needs_gradient, snip.due(100)
    (True, False)
"""
