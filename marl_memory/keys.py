"""The one place where TensorDict entries are spelled.

A bare key is time *t*, ``("next", key)`` is time *t + 1*; there is no third spelling.  Shapes are given as ``[*B, …]``
with ``*B`` the batch (``[N]`` for a vector step of N environments, ``[T, N]`` for a collected batch, ``[R]`` for the
rows of a minibatch), ``A`` agents, ``F`` observation features, ``P`` action size, ``S`` state features, ``C`` critics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Entry:
    """What room is made for under ``learn``.

    Args:
        shape: behind the batch's dimensions.
        dtype: None: the reward's.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def zeros(self, batch: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Room for a batch ``[*B]``; ``dtype`` is the reward's."""
        return torch.zeros(*batch, *self.shape, dtype=self.dtype or dtype)


Entries = dict[tuple[str, ...], Entry]
"""By key."""


@dataclass(frozen=True)
class Keys:
    """Names of the entries a task, a policy and a learner exchange.

    Args:
        group: the name of the agents' group; entries with an agent dimension live under it.

    Written by the environment (at t and at t + 1):

    | attribute   | shape           | dtype   | meaning                                                               |
    |-------------|-----------------|---------|-----------------------------------------------------------------------|
    | observation | ``[*B, A, F]``  | float32 | own observation (pictures: uint8, flat); unequal ones padded with 0   |
    | action_mask | ``[*B, A, P]``  | bool    | allowed actions (discrete tasks only)                                 |
    | alive       | ``[*B, A]``     | bool    | whether the agent acts at this step                                   |
    | state       | ``[*B, S]``     | float32 | the task's global state, else all observations (pictures: uint8)      |
    | done        | ``[*B, 1]``     | bool    | the episode ended (terminated or truncated)                           |
    | terminated  | ``[*B, 1]``     | bool    | it ended in a terminal state: nothing to bootstrap                    |
    | truncated   | ``[*B, 1]``     | bool    | it was cut (time limit): bootstrap from the last state                |

    At t + 1 ``alive`` is False once the agent (or the episode) *terminated*, still True if it was only truncated.

    Written by the environment at t + 1 only:

    | attribute   | shape           | dtype   | meaning                                                               |
    |-------------|-----------------|---------|-----------------------------------------------------------------------|
    | reward      | ``[*B, A, 1]``  | float32 | reward of each agent; equal for all where it is common                |
    | discount    | ``[*B, A, 1]``  | float32 | 0 where this agent's return ends with no bootstrap, else 1            |
    | success     | ``[*B, 1]``     | bool    | the episode was won (only tasks whose spec has it)                    |
    | measures    | ``[*B, M]``     | float32 | what an episode's end tells beside (only tasks whose spec names them) |
    | dropped     | ``[*B, 1]``     | bool    | the episode broke off and counts for nothing (see `TaskSpec`)         |

    Written by the policy: ``action`` (``[*B, A]`` int64, or ``[*B, A, P]`` float32) and ``log_prob`` (``[*B, A]``).

    Written by the learner, under the preallocated ``learn`` entry: ``learn_reward`` (``[*B, A, 1]``, what learners
    read: the environment's reward, scaled, plus what REWARD operators add), ``value_output`` (``[*B, A, C]``, what
    the critic network gave, in its own units), ``value`` and ``next_value`` (``[*B, A, C]``, in units of
    ``learn_reward``), ``advantage`` (``[*B, A, 1]``), ``value_target`` (``[*B, A, C]``), ``under_weight``
    (``[*B, A, 1]``, weight of the squared error where a value lies under its target; 1 is the plain square), and
    ``action_gradient`` (``[*B, A, P]``, ∂Q/∂a in units of `ActionVector`).  And, where a memory asks for them,
    ``td_error`` (``[*B, A, C']``, target − value of the first C' critics) and ``policy_action`` (``[*B, A, P]``, what
    the policy does at the observation, in units of `ActionVector`; probabilities where actions are discrete);
    ``features`` (``[*B, A, H]``, what the last layer of the actor reads at the observation, detached); the
    parameters of the policy that acted, ``policy(name)`` (``[*B, A, P]``: ``log_probs``, or ``loc`` and ``scale``
    before squashing); ``action_values`` (``[*B, A, P]``, Q of every discrete action: no host of ours has it).

    Written by REGION operators under ``region`` and their own name: a reference distribution p*, in the names of
    ``policy(name)``, and ``weight`` (``[*B, A]``): the host adds weight · KL(p*‖π) to its loss (``w2_weight``: W₂²).

    Written by REPLAY operators under ``replay`` and their own name: rows beside the batch's, one team row for each, in
    the names of the batch's own entries: what actor and critic read (``observation``, ``action_mask``, ``state``),
    ``action`` and ``alive`` (``[*B, A]``, where there is a row); and ``value_target`` (``[*B, A, 1]``, in units of
    ``learn_reward``), ``policy_weight`` and ``value_weight`` (``[*B, A]``): the host adds
    −policy_weight · log π(a|o) + value_weight · (V − value_target)², with V and target in the critic's units.

    Written by ACT operators, under ``act``, between policy and environment: ``taken`` (``[*B, A]`` bool, memory's
    action was executed and is in ``action``), ``act_weight`` (``[*B, A]``, w: with this probability it would be),
    ``confidence`` (``[*B, A]``), and the parameters of memory's own policy, ``memory_policy(name)``, in the names of
    ``policy(name)``.  The behaviour was the mixture w · memory + (1 − w) · policy.  A host that learns from its own
    actions (PPO) then writes log π of the executed action into ``log_prob``, and log b of the mixture into
    ``behaviour_log_prob`` (``[*B, A]``, under ``learn``); its policy's loss leaves out what memory did.

    Written by the replay: ``row`` (``[*B]`` int64, the number of the row since the run began; never used twice).
    """

    group: str = "agents"

    observation: tuple[str, ...] = field(init=False)
    action_mask: tuple[str, ...] = field(init=False)
    alive: tuple[str, ...] = field(init=False)
    reward: tuple[str, ...] = field(init=False)
    discount: tuple[str, ...] = field(init=False)
    action: tuple[str, ...] = field(init=False)
    log_prob: tuple[str, ...] = field(init=False)

    state: str = field(init=False, default="state")
    done: str = field(init=False, default="done")
    terminated: str = field(init=False, default="terminated")
    truncated: str = field(init=False, default="truncated")
    success: str = field(init=False, default="success")
    measures: str = field(init=False, default="measures")
    dropped: str = field(init=False, default="dropped")

    learn: str = field(init=False, default="learn")
    learn_reward: tuple[str, ...] = field(init=False, default=("learn", "reward"))
    value_output: tuple[str, ...] = field(init=False, default=("learn", "value_output"))
    value: tuple[str, ...] = field(init=False, default=("learn", "value"))
    next_value: tuple[str, ...] = field(init=False, default=("learn", "next_value"))
    advantage: tuple[str, ...] = field(init=False, default=("learn", "advantage"))
    value_target: tuple[str, ...] = field(init=False, default=("learn", "value_target"))
    under_weight: tuple[str, ...] = field(init=False, default=("learn", "under_weight"))
    action_gradient: tuple[str, ...] = field(init=False, default=("learn", "action_gradient"))

    td_error: tuple[str, ...] = field(init=False, default=("learn", "td_error"))
    policy_action: tuple[str, ...] = field(init=False, default=("learn", "policy_action"))
    features: tuple[str, ...] = field(init=False, default=("learn", "features"))

    action_values: tuple[str, ...] = field(init=False, default=("learn", "action_values"))
    region: tuple[str, ...] = field(init=False, default=("learn", "region"))
    replay: tuple[str, ...] = field(init=False, default=("learn", "replay"))

    taken: tuple[str, ...] = field(init=False, default=("act", "taken"))
    act_weight: tuple[str, ...] = field(init=False, default=("act", "weight"))
    confidence: tuple[str, ...] = field(init=False, default=("act", "confidence"))
    behaviour_log_prob: tuple[str, ...] = field(init=False, default=("learn", "behaviour_log_prob"))

    row: str = field(init=False, default="row")

    def __post_init__(self) -> None:
        names = ("observation", "action_mask", "alive", "reward", "discount", "action")
        for name in names:
            object.__setattr__(self, name, (self.group, name))
        object.__setattr__(self, "log_prob", (self.group, "action_log_prob"))

    def policy(self, name: str) -> tuple[str, ...]:
        """A parameter of the policy's distribution: ``log_probs``, ``loc`` or ``scale``."""
        return ("learn", "policy", name)

    def memory_policy(self, name: str) -> tuple[str, ...]:
        """As `policy`, of what acts in its place."""
        return ("act", "policy", name)
