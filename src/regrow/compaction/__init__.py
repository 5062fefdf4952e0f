"""What a model's graph ties together: a network without what is dead in it, or with what is alike side by side."""

from regrow.compaction.compact import Compacted as Compacted
from regrow.compaction.compact import compact as compact
from regrow.compaction.order import order_outputs as order_outputs
from regrow.compaction.report import Kept as Kept
from regrow.compaction.report import Report as Report
