"""Compaction: a sparse network without what is dead in it, as a smaller dense one."""

from regrow.compaction.compact import Compacted as Compacted
from regrow.compaction.compact import compact as compact
from regrow.compaction.report import Kept as Kept
from regrow.compaction.report import Report as Report
