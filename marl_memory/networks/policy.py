"""What a run leaves: a policy, whichever learner made it."""

from __future__ import annotations

from marl_memory.networks.actor import Actor
from marl_memory.networks.deterministic import DeterministicActor
from marl_memory.networks.greedy import GreedyActor

Policy = Actor | DeterministicActor | GreedyActor
"""Sets the action of a TensorDict of observations; with ``greedy`` set it draws nothing."""
