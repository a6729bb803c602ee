"""One model over several processes: what each takes of the work, and what all of them know."""

from harness.parallel.joined import joined
from harness.parallel.ranks import ALONE, RankLost, Ranks

__all__ = ["ALONE", "RankLost", "Ranks", "joined"]
