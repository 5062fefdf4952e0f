"""Floor 2, what: the parts that a method is made of, in one flat namespace with its vocabulary.

One import is enough for a method of your own:

    from regrow.parts import Method, Need, by_gradient, cosine, drop_and_grow, erk, every, random_topology, smallest

The nouns, and what there is of each (their types stand in `regrow.core.method`):

* a score says how much each active entry deserves to stay: `magnitude`, `saliency`, `taylor`, ...
* a drop says what stays when every weight loses a fraction: `lowest(score)`, `lowest_per_sign`, ...
* a field is a value for every position, read block by block: `gradient`, `momentum`
* a growth says where entries appear: `highest(field)`, `at_random`, `unexplored_first`, `mixed(...)`, ...
* a statistic is a weight's share of what is redistributed: `mean_momentum`, `mean_magnitude`, `nonzeros`, `survivors`
* an allocation says how many entries each weight gets: `uniform`, `erk`, `globally`, `layer_adaptive`, ...
* a schedule is a number over training: `cosine`, `cubic`, `constant`, ...
* units are what is active or inactive together: `groups(8)`, `blocks(...)`, `rows`; a recipe takes them as `structure=`
* a structure says which patterns of entries are allowed: any of those, `n_of_m(...)`, `constant_fan_in`
* an update changes topologies: `prune` and `drop_and_grow`, joined by `chain`, gated by `every`
* a start makes the first topologies: `random_topology`, `by_score`, `prune_global`, `in_rounds`, ...
* an observer watches every step: `keep_momentum`, `mark_explored`; what it keeps is `Remembered`
* a reparametrization computes a weight from values that are trained in its place: `straight_through`, `gated`, ...
"""

from regrow.core.draws import Stream
from regrow.core.method import (
    Allocation,
    Drop,
    Field,
    Growth,
    Latent,
    Made,
    Method,
    Need,
    Observer,
    Parts,
    Probe,
    Regrow,
    Rule,
    Score,
    Start,
    Statistic,
    Structure,
    Timing,
    Trained,
    Units,
    Update,
)
from regrow.core.topology import (
    Topology,
    fan_in_scale,
)
from regrow.core.units import (
    Pool,
    largest,
    mean,
    root_mean_square,
)
from regrow.core.weight import (
    Shaped,
    Sized,
    SparseWeight,
    Weights,
)
from regrow.parts.allocation import (
    apportion,
    at_least,
    by_flops,
    counts,
    er,
    erk,
    erk_power,
    explicit,
    globally,
    last_at_least,
    layer_adaptive,
    proportional,
    require_last,
    uniform,
    whole_units,
)
from regrow.parts.drops import (
    Careful,
    adaptive_threshold,
    keep_highest,
    lowest,
    lowest_diagonals,
    lowest_globally,
    lowest_per_sign,
    require_equal_units,
    share,
    smallest,
)
from regrow.parts.growth import (
    READS,
    Reading,
    at_random,
    at_random_where_lost,
    by_gradient,
    by_gradient_where_lost,
    by_momentum,
    by_momentum_per_neuron,
    diagonals_at_random,
    gradient,
    half_by_gradient,
    highest,
    highest_diagonals,
    highest_per_neuron,
    mixed,
    momentum,
    needs_of,
    require_finite,
    sampled_gradient,
    unexplored_first,
)
from regrow.parts.observers import (
    EXPLORATION,
    explored_entries,
    keep_momentum,
    mark_explored,
)
from regrow.parts.permutations import (
    assignment,
    make_doubly_stochastic,
    near_identity,
    permutation_distance,
    permuted,
)
from regrow.parts.redistribution import (
    mean_magnitude,
    mean_momentum,
    nonzeros,
    survivors,
)
from regrow.parts.remembered import (
    BACKWARD_SET,
    DIAGONAL_COUNT,
    DIAGONAL_LOGITS,
    DROP_THRESHOLD,
    EXPLORED,
    GATE_LOGITS,
    INPUT_ORDER,
    LATENT,
    LOG_VARIANCE,
    MOMENTUM,
    MOVEMENT_SCORES,
    PATTERN,
    PERMUTATION,
    PLACED,
    SCALE,
    SOFT_THRESHOLD,
    TARGET,
    TEMPERATURE,
    Remembered,
    Stateful,
)
from regrow.parts.reparametrizations import (
    GATE_HIGH,
    GATE_LOW,
    DenseScore,
    activate_highest,
    activate_where,
    dropout_divergence,
    equal_diagonals,
    filled_with,
    gated,
    hard_concrete,
    highest_positions,
    latent_magnitude,
    log_dropout,
    noisy,
    one_number,
    open_probability,
    ranked_counts,
    shrunk,
    soft_diagonals,
    soft_threshold,
    start_by,
    straight_through,
)
from regrow.parts.rounds import (
    Candidates,
    Sensitivity,
    connection_sensitivity,
    every_position,
    gradient_flow,
    in_rounds,
    outputs_in_rounds,
    remaining,
    synaptic_flow,
)
from regrow.parts.schedules import (
    Anneal,
    Schedule,
    constant,
    cosine,
    cosine_to,
    cosine_to_half_percent,
    cubic,
    inverse_power,
    linear,
)
from regrow.parts.scores import (
    magnitude,
    magnitude_and_gradient,
    random,
    saliency,
    taylor,
    unit_scores,
)
from regrow.parts.starts import (
    by_score,
    dense,
    given,
    prune_and_grow_global,
    prune_and_grow_structured,
    prune_and_grow_uniform,
    prune_global,
    prune_structured,
    prune_uniform,
    random_fan_in,
    random_topology,
    scale_to_fan_in,
    signed,
    signs,
)
from regrow.parts.structures import (
    Boxes,
    Diagonals,
    active_diagonals,
    best_of_each,
    blocks,
    by_output,
    columns,
    constant_fan_in,
    diagonals,
    evenly,
    fan_ins,
    groups,
    heads,
    n_of_m,
    of_outputs,
    outputs_of,
    rows,
    unstructured,
)
from regrow.parts.updates import (
    chain,
    checked,
    drop_and_grow,
    every,
    everywhere,
    grown_counts,
    prune,
    prune_to,
    reached,
    rewire,
)

# fmt: off
__all__ = [  # noqa: RUF022 - by noun
    # Vocabulary
    "Allocation", "Drop", "fan_in_scale", "Field", "Growth", "Latent", "Made", "Method", "Need", "Observer", "Parts",
    "Probe", "Regrow", "Rule", "Score", "Shaped", "Sized", "SparseWeight", "Start", "Statistic", "Stream", "Structure",
    "Timing", "Topology", "Trained", "Units", "Update", "Weights",
    # Scores
    "magnitude", "magnitude_and_gradient", "random", "saliency", "taylor", "unit_scores",
    # Drops
    "adaptive_threshold", "Careful", "keep_highest", "lowest", "lowest_diagonals", "lowest_globally", "lowest_per_sign",
    "require_equal_units", "share", "smallest",
    # Fields and growths
    "at_random", "at_random_where_lost", "by_gradient", "by_gradient_where_lost", "by_momentum",
    "by_momentum_per_neuron", "diagonals_at_random", "gradient", "half_by_gradient", "highest", "highest_diagonals",
    "highest_per_neuron", "mixed", "momentum", "needs_of", "Reading", "READS", "require_finite", "sampled_gradient",
    "unexplored_first",
    # Statistics
    "mean_magnitude", "mean_momentum", "nonzeros", "survivors",
    # Allocations
    "apportion", "at_least", "by_flops", "counts", "er", "erk", "erk_power", "explicit", "globally",
    "last_at_least", "layer_adaptive", "proportional", "require_last", "uniform", "whole_units",
    # Schedules
    "Anneal", "constant", "cosine", "cosine_to", "cosine_to_half_percent", "cubic", "inverse_power", "linear",
    "Schedule",
    # Structures
    "active_diagonals", "best_of_each", "blocks", "Boxes", "by_output", "columns", "constant_fan_in", "diagonals",
    "Diagonals", "evenly", "fan_ins", "groups",
    "heads", "largest", "mean", "n_of_m", "of_outputs", "outputs_of", "Pool", "root_mean_square", "rows",
    "unstructured",
    # Updates
    "chain", "checked", "drop_and_grow", "every", "everywhere", "grown_counts", "prune", "prune_to", "reached",
    "rewire",
    # Starts
    "by_score", "dense", "given", "prune_and_grow_global", "prune_and_grow_structured", "prune_and_grow_uniform",
    "prune_global", "prune_structured", "prune_uniform", "random_fan_in", "random_topology",
    "scale_to_fan_in", "signed", "signs",
    # Starts in rounds
    "Candidates", "connection_sensitivity", "every_position", "gradient_flow", "in_rounds", "outputs_in_rounds",
    "remaining", "Sensitivity", "synaptic_flow",
    # Observers
    "EXPLORATION", "explored_entries", "keep_momentum", "mark_explored",
    # What is remembered
    "BACKWARD_SET", "DIAGONAL_COUNT", "DIAGONAL_LOGITS", "DROP_THRESHOLD", "EXPLORED", "GATE_LOGITS", "INPUT_ORDER",
    "LATENT", "LOG_VARIANCE", "MOMENTUM", "MOVEMENT_SCORES", "PATTERN", "PERMUTATION", "PLACED", "Remembered", "SCALE",
    "SOFT_THRESHOLD", "Stateful", "TARGET", "TEMPERATURE",
    # Reparametrizations
    "activate_highest", "activate_where", "DenseScore", "dropout_divergence", "equal_diagonals", "filled_with",
    "GATE_HIGH", "GATE_LOW", "gated", "hard_concrete", "highest_positions", "latent_magnitude", "log_dropout", "noisy",
    "one_number", "open_probability", "ranked_counts", "shrunk", "soft_diagonals", "soft_threshold", "start_by",
    "straight_through",
    # Permutations of inputs
    "assignment", "make_doubly_stochastic", "near_identity", "permutation_distance", "permuted",
]
# fmt: on
