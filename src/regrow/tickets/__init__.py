"""Floor 6: procedures around training: lottery tickets with rewinding, and Sup-tickets, beside any loop."""

from regrow.tickets.batchnorm import reestimate_batchnorm as reestimate_batchnorm
from regrow.tickets.cycles import Plan as Plan
from regrow.tickets.cycles import plan as plan
from regrow.tickets.cycles import reexploring as reexploring
from regrow.tickets.cycles import triangular as triangular
from regrow.tickets.cycles import without_updates_from as without_updates_from
from regrow.tickets.lottery import lottery as lottery
from regrow.tickets.lottery import reinitialized as reinitialized
from regrow.tickets.lottery import rewind as rewind
from regrow.tickets.lottery import round_densities as round_densities
from regrow.tickets.lottery import shuffled as shuffled
from regrow.tickets.lottery import winning as winning
from regrow.tickets.snapshot import Snapshot as Snapshot
from regrow.tickets.superpose import Superposition as Superposition
from regrow.tickets.superpose import ensemble as ensemble
from regrow.tickets.superpose import layer_preserving as layer_preserving
from regrow.tickets.ticket import Ticket as Ticket
from regrow.tickets.ticket import installed as installed
