"""Small tasks whose best return is known: beds for exploration and memory, and two teams for tests and examples.

`teams` are two hand-written PettingZoo environments, which exercise masks, deaths and unequal agents.  Every other
module is one task: its rules are written once, over N copies (`rules`), and shown as one PettingZoo environment and as
a vector of them (`shown`).
"""

from marl_memory_envs.toy.teams import MaskedDuel, Rendezvous

__all__ = ["REQUIRES", "MaskedDuel", "Rendezvous"]

REQUIRES: dict[str, str] = {}
