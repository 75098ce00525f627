"""PPO, IPPO and MAPPO against a plain transcript, and what an update may and may not depend on."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor, nn

from benchmarks import plain_mappo as plain
from marl_memory.algorithms.ppo import PPO
from marl_memory.keys import Keys
from marl_memory.networks.distributions import MaskedCategorical, TanhNormal
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.collection import Collector

K = Keys()
FEATURES, ACTIONS, STATE = 5, 4, 7
BODY = partial(MLP, hidden=(16, 16))


torch.set_num_threads(1)  # tensors this small are not worth sharing out


# ------------------------------------------------------------------------------------------------- synthetic batches


def task(agents: int = 3, *, continuous: bool = False, common: bool = True, unequal: bool = False) -> TaskSpec:
    sizes = (ACTIONS,) * (agents - unequal) + (ACTIONS - 1,) * unequal
    if continuous:
        pads = [(0.0,) * (ACTIONS - size) for size in sizes]  # environments pad bounds with zeros
        low = tuple((-1.0, -2.0, 0.0, -1.0)[:size] + pad for size, pad in zip(sizes, pads, strict=True))
        high = tuple((1.0, 2.0, 3.0, 0.0)[:size] + pad for size, pad in zip(sizes, pads, strict=True))
        bounds: dict[str, Any] = {"action_low": low, "action_high": high}
    else:
        bounds = {}
    return TaskSpec(
        name="synthetic",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=(FEATURES,) * agents,
        action_sizes=sizes,
        continuous=continuous,
        state_size=FEATURES if agents == 1 else STATE,
        own_state=agents > 1,
        common_reward=common,
        **bounds,
    )


def synthetic(
    algorithm: PPO, seed: int, *, steps: int = 12, n: int = 4, dtype: torch.dtype = torch.float32
) -> TensorDict:
    """A batch ``[T, N]`` as environments write it: deaths, terminations, truncations, masks; actions by the policy.

    Its log-probabilities are off by some noise, so that ratios are away from 1 and clipping happens.
    """
    spec, g = algorithm.spec, Generator().manual_seed(seed)
    a, shape = spec.n_agents, (steps, n)

    def normal(*tail: int, lead: tuple[int, ...] = shape) -> Tensor:
        return torch.randn(*lead, *tail, generator=g, dtype=dtype)

    def chance(p: float, *tail: int) -> Tensor:
        return torch.rand(*shape, *tail, generator=g) < p

    terminated, truncated = chance(0.08), chance(0.08)
    truncated &= ~terminated
    done = terminated | truncated
    dies = chance(0.1, a)
    alive = torch.ones(*shape, a, dtype=torch.bool)
    next_alive = alive.clone()
    for t in range(steps):
        left = alive[t] & ~dies[t]
        next_alive[t] = torch.where(left.any(-1, keepdim=True), left, alive[t]) & ~terminated[t, :, None]
        if t + 1 < steps:
            alive[t + 1] = next_alive[t] | done[t, :, None]
    discount = torch.ones(*shape, a, 1, dtype=dtype)
    discount[terminated] = 0.0
    if not spec.common_reward:
        discount[~next_alive] = 0.0

    observation, state = normal(a, FEATURES) * alive.unsqueeze(-1), normal(STATE)
    if a == 1:
        state = observation.squeeze(-2)
    last_seen, last_state = normal(a, FEATURES) * next_alive.unsqueeze(-1), normal(STATE)
    if a == 1:
        last_state = last_seen.squeeze(-2)
    goes_on = ~done
    goes_on[-1] = False
    next_observation, next_state = last_seen.clone(), last_state.clone()
    next_observation[:-1] = torch.where(goes_on[:-1, :, None, None], observation[1:], last_seen[:-1])
    next_state[:-1] = torch.where(goes_on[:-1, :, None], state[1:], last_state[:-1])
    reward = normal(a, 1) * 3 + 1
    if spec.common_reward:
        reward = reward[:, :, :1].expand(-1, -1, a, -1).clone()

    batch = TensorDict(batch_size=shape)
    for key, x in (
        (K.observation, observation), (K.state, state), (K.alive, alive),
        (("next", *K.observation), next_observation), (("next", K.state), next_state), (("next", *K.alive), next_alive),
        (("next", *K.reward), reward), (("next", *K.discount), discount), (("next", K.done), done.unsqueeze(-1)),
        (("next", K.terminated), terminated.unsqueeze(-1)), (("next", K.truncated), truncated.unsqueeze(-1)),
    ):  # fmt: skip
        batch.set(key, x)
    if not spec.continuous:
        mask = chance(0.6, a, ACTIONS)
        mask[..., 0] = True
        batch.set(K.action_mask, mask)
    algorithm.actor.densities = True  # this batch comes with densities, which are changed below
    algorithm.actor(batch)
    batch.get(K.log_prob).add_(0.3 * normal(a))
    for key, entry in algorithm.learn_entries.items():
        batch.set(key, entry.zeros(shape, dtype))
    return batch


def updated(algorithm: PPO, batch: TensorDictBase) -> None:
    """One whole update, as the trainer does it."""
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    for minibatch in algorithm.minibatches(batch):
        algorithm.update(minibatch)
    algorithm.finish_update(batch)


def learner(spec: TaskSpec | None = None, **kwargs: Any) -> PPO:
    return PPO(**{"spec": spec or task(), "network": BODY, "seed": 3, **kwargs})


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --------------------------------------------------------------------------------------- (a) equal to the transcript

CASES = {
    "PPO discrete": {"agents": 1},
    "PPO continuous": {"agents": 1, "continuous": True},
    "PPO individual reward": {"agents": 1, "common": False, "value_norm": False, "value_clip": None},
    "MAPPO": {"centralised_critic": True, "share_parameters": True},
    "MAPPO without normalisation": {
        "centralised_critic": True, "share_parameters": True, "value_norm": False, "normalise_advantages": False,
    },
    "MAPPO without value clip": {"centralised_critic": True, "share_parameters": True, "value_clip": None},
    "MAPPO individual rewards": {"common": False, "centralised_critic": True, "share_parameters": True},
    "MAPPO apart": {"centralised_critic": True},
    "IPPO": {"share_parameters": True},
    "IPPO individual rewards": {"common": False, "share_parameters": True},
    "IPPO apart continuous": {"continuous": True},
}  # fmt: skip


def linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def plain_batch(batch: TensorDictBase) -> dict[str, Tensor]:
    names = {
        "observation": K.observation, "state": K.state, "action": K.action, "log_prob": K.log_prob, "alive": K.alive,
        "next_observation": ("next", *K.observation), "next_state": ("next", K.state), "next_alive": ("next", *K.alive),
    }  # fmt: skip
    data = {name: batch.get(key).clone() for name, key in names.items()}
    if K.action_mask in batch.keys(include_nested=True):
        data["mask"] = batch.get(K.action_mask).clone()
    data["done"] = batch.get(("next", K.done)).squeeze(-1)
    return data | {name: batch.get(("next", K.group, name)).squeeze(-1).clone() for name in ("reward", "discount")}


@pytest.mark.parametrize("case", sorted(CASES))
def test_100_updates_equal_the_plain_transcripts(case: str) -> None:
    switches = {"value_norm": True, "value_clip": 0.05, "normalise_advantages": True, **CASES[case]}
    spec = task(**{key: switches.pop(key) for key in ("agents", "continuous", "common") if key in switches})
    epochs, minibatches = 2, 2
    numbers = {
        "gamma": 0.95,
        "gae_lambda": 0.9,
        "clip": 0.15,
        "value_coef": 0.7,
        "entropy_coef": 0.02,
        "max_grad_norm": 0.5,
        **{key: switches[key] for key in ("value_clip", "normalise_advantages")},
    }
    sizes = {"lr": 2e-3, "adam_eps": 1e-5, "epochs": epochs, "minibatches": minibatches}
    algorithm = learner(spec, **sizes, **{**numbers, **switches}).double()
    settings = plain.Settings(
        centralised=switches.get("centralised_critic", False),
        common_reward=spec.common_reward,
        low=torch.tensor(spec.action_low) if spec.continuous else None,
        high=torch.tensor(spec.action_high) if spec.continuous else None,
        **numbers,
    )
    reference = plain.like(algorithm, settings)
    start = [linear.weight.detach().clone() for linear in linears(reference.actor)]
    for update in range(100 // (epochs * minibatches)):
        batch = synthetic(algorithm, update, dtype=torch.float64)
        rows = Generator()
        rows.set_state(algorithm.generator.get_state())
        noise = Generator()
        noise.set_state(algorithm.entropy_generator.get_state())
        orders = [torch.randperm(batch.numel(), generator=rows).tensor_split(minibatches) for _ in range(epochs)]

        def draw(count: int, noise: Generator = noise) -> Tensor:
            return torch.randn(count, spec.n_agents, ACTIONS, generator=noise, dtype=torch.float64)

        plain.learn(reference, plain_batch(batch), orders, draw)
        updated(algorithm, batch)

    moved = [(x - linear.weight).abs().max() for x, linear in zip(start, linears(reference.actor), strict=True)]
    assert min(moved) > 1e-3  # or the comparison would say nothing
    for network, ours in ((reference.actor, algorithm.actor), (reference.critic, algorithm.critic)):
        theirs = linears(network)
        for slot, layer in enumerate(ours.body.layers):
            for bank, (weight, bias) in enumerate(zip(*plain.weights_and_biases(layer), strict=True)):
                linear = theirs[bank * len(ours.body.layers) + slot]
                torch.testing.assert_close(weight, linear.weight, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(bias, linear.bias, atol=1e-6, rtol=1e-6)
    if spec.continuous:
        torch.testing.assert_close(algorithm.actor.log_std, reference.log_std, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------- (b) one agent is plain PPO


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    "switches", [{"centralised_critic": True, "share_parameters": True}, {"share_parameters": True}]
)
def test_with_one_agent_mappo_and_ippo_are_ppo_bit_for_bit(switches: dict[str, bool], normalise: bool) -> None:
    vector = pytest.importorskip("marl_memory_envs.vector")

    def trained(**switches: bool) -> tuple[PPO, TensorDictBase]:
        env = vector.vector_env(
            "marl_memory_envs.classic:cartpole", name="cartpole", common_reward=False, n_envs=4, seed=1
        )
        options = {"normalise_observations": normalise, "scale_rewards": normalise}
        algorithm = learner(env.task_spec, lr=1e-2, **options, **switches)
        entries = algorithm.learn_entries
        collector = Collector(env, algorithm.actor, lambda td: None, steps=24, learn_entries=entries, seed=1)
        for _ in range(4):
            batch, _ = collector.collect()
            updated(algorithm, batch)
        env.close()
        return algorithm, batch

    (ppo, ppo_batch), (other, other_batch) = trained(), trained(**switches)
    assert ppo_batch.get(("next", K.done)).any()
    assert torch.equal(ppo_batch.get(K.observation), other_batch.get(K.observation))
    assert torch.equal(ppo_batch.get(K.value_target), other_batch.get(K.value_target))
    assert same_parameters(ppo, other)
    assert not same_parameters(ppo, learner(ppo.spec, normalise_observations=normalise))


# ---------------------------------------------------------------------------------------------- (c) the dead are silent

ARRANGEMENTS = [
    {"centralised_critic": True, "share_parameters": True},
    {"share_parameters": True},
    {"centralised_critic": True},
    {},
]


def gradients(algorithm: PPO, batch: TensorDictBase) -> dict[str, Tensor]:
    """Of one gradient step over all rows."""
    algorithm.generator.manual_seed(0)
    algorithm.entropy_generator.manual_seed(0)
    minibatch = next(iter(algorithm.minibatches(batch)))
    before = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    algorithm.update(minibatch)
    found = {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, p in algorithm.named_parameters():
            p.copy_(before[name])
    return found


@pytest.mark.parametrize("garbage", ["random", "huge", "nan"])
@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("arrangement", range(4))
def test_what_the_dead_do_changes_no_gradient_bit(
    arrangement: int, continuous: bool, common: bool, garbage: str
) -> None:
    spec = task(continuous=continuous, common=common)
    fill = {"random": lambda x: torch.randn_like(x), "huge": lambda x: torch.full_like(x, 1e30)}
    results = []
    for corrupt in (False, True):
        algorithm = learner(spec, **ARRANGEMENTS[arrangement], minibatches=1, max_grad_norm=1e9)
        batch = synthetic(algorithm, 5)
        algorithm.derive_rewards(batch)
        algorithm.compute_advantages(batch)
        dead = ~batch.get(K.alive)
        assert dead.sum() > 10
        if corrupt:
            torch.manual_seed(0)
            finite = fill.get(garbage, fill["random"])
            if continuous:
                batch.get(K.action)[dead] = finite(batch.get(K.action)[dead])
            else:
                batch.get(K.action)[dead] = torch.randint(ACTIONS, (int(dead.sum()),))
            for key, tail in ((K.log_prob, False), (K.advantage, True)):
                entry = batch.get(key).squeeze(-1) if tail else batch.get(key)
                entry[dead] = torch.nan if garbage == "nan" else finite(entry[dead])
            target = batch.get(K.value_target).squeeze(-1)
            target[dead] = finite(target[dead])
        results.append(gradients(algorithm, batch))
    clean, corrupted = results
    assert all(torch.equal(clean[name], corrupted[name]) for name in clean)
    assert any(gradient.abs().sum() > 0 for gradient in clean.values())


@pytest.mark.parametrize("common", [True, False])
def test_a_reward_after_death_reaches_back_only_where_it_is_common(common: bool) -> None:
    results = []
    for bonus in (0.0, 5.0):
        algorithm = learner(task(2, common=common), value_norm=False, normalise_advantages=False, share_parameters=True)
        batch = synthetic(algorithm, 0)
        for key in (K.done, K.terminated, K.truncated):
            batch.get(("next", key)).fill_(False)
        alive = torch.ones(12, 4, 2, dtype=torch.bool)
        alive[4:, :, 0] = False  # agent 0 dies at the end of row 3
        batch.set(K.alive, alive)
        batch.set(("next", *K.alive), torch.cat([alive[1:], alive[-1:]]))
        batch.get(("next", *K.discount)).fill_(1.0)
        if not common:
            batch.get(("next", *K.discount))[3:, :, 0] = 0.0
        batch.get(("next", *K.reward))[6] += bonus
        algorithm.derive_rewards(batch)
        algorithm.compute_advantages(batch)
        results.append(batch.get(K.advantage).squeeze(-1)[:4, :, 0].clone())
    without, with_bonus = results
    assert not torch.isclose(without, with_bonus).any() if common else torch.equal(without, with_bonus)


# ------------------------------------------------------------------------------------------- (d) the true last states


@pytest.mark.parametrize("centralised", [True, False])
def test_truncated_rows_bootstrap_from_the_true_last_observation(centralised: bool) -> None:
    algorithm = learner(centralised_critic=centralised, share_parameters=True)
    key = ("next", K.state) if centralised else ("next", *K.observation)
    batch = synthetic(algorithm, 1)
    truncated, terminated = (batch.get(("next", k)).squeeze(-1)[:-1] for k in (K.truncated, K.terminated))
    assert truncated.any()
    assert terminated.any()

    def computed(change: Tensor | None) -> tuple[Tensor, Tensor]:
        changed = batch.clone()
        if change is not None:
            changed.get(key)[:-1][change] += 1.0
        algorithm.derive_rewards(changed)
        algorithm.compute_advantages(changed)
        return changed.get(K.next_value).clone(), changed.get(K.value_target).clone()

    base_next, base_target = computed(None)
    cut_next, cut_target = computed(truncated)
    assert not torch.isclose(base_next[:-1][truncated], cut_next[:-1][truncated]).any()
    assert torch.equal(base_next[:-1][~truncated], cut_next[:-1][~truncated])
    assert not torch.equal(base_target, cut_target)
    end_next, end_target = computed(terminated)
    assert torch.equal(base_next, end_next)
    assert torch.equal(base_target, end_target)


def test_every_next_value_that_counts_is_that_of_the_true_next_state() -> None:
    algorithm = learner(centralised_critic=True, share_parameters=True)
    batch = synthetic(algorithm, 2)
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    expected = algorithm.bootstrap_values(batch.get("next")).detach()
    counts = ~batch.get(("next", K.terminated)).squeeze(-1)
    torch.testing.assert_close(batch.get(K.next_value)[counts], expected[counts])


# ------------------------------------------------------------------------------------ (e, g) the living's means only


def test_under_a_common_reward_the_dead_take_the_livings_mean_value() -> None:
    algorithm = learner(share_parameters=True)
    batch = synthetic(algorithm, 3)
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    raw, alive, value = algorithm.bootstrap_values(batch).detach(), batch.get(K.alive), batch.get(K.value)
    assert (~alive).any()
    for t, n in (~alive).any(-1).nonzero().tolist():
        living = raw[t, n][alive[t, n]]
        torch.testing.assert_close(value[t, n][alive[t, n]], living)
        torch.testing.assert_close(value[t, n][~alive[t, n]], living.mean().expand_as(value[t, n][~alive[t, n]]))


def test_statistics_are_of_the_living() -> None:
    algorithm = learner(task(common=False), share_parameters=True)
    batch = synthetic(algorithm, 4)
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    alive = batch.get(K.alive)
    assert (~alive).any()
    advantage = batch.get(K.advantage).squeeze(-1)[alive]
    assert advantage.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantage.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    target = batch.get(K.value_target).squeeze(-1)
    target[~alive] = 1e6
    next(iter(algorithm.minibatches(batch)))
    assert algorithm.value_norm is not None
    assert algorithm.value_norm.moments() == pytest.approx(
        (target[alive].mean().item(), target[alive].std(correction=0).item()), rel=1e-4
    )


def test_scaled_rewards_have_the_scale_of_their_discounted_sum() -> None:
    algorithm = learner(task(common=False), share_parameters=True, scale_rewards=True, gamma=0.5)
    sums = []
    carry = torch.zeros(4, 3)
    for seed in range(3):
        batch = synthetic(algorithm, seed)
        reward = batch.get(("next", *K.reward)).squeeze(-1)
        ends = batch.get(("next", K.done)) | ~batch.get(("next", *K.alive))
        for t in range(len(reward)):
            carry = 0.5 * carry + reward[t]
            sums.append(carry[batch.get(K.alive)[t]])
            carry = torch.where(ends[t], 0.0, carry)
        algorithm.derive_rewards(batch)
        deviation = torch.cat(sums).std(correction=0)
        torch.testing.assert_close(batch.get(K.learn_reward).squeeze(-1), reward / deviation, rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.get(("next", *K.reward)).squeeze(-1), reward)  # the environment's stay


def test_padded_action_dimensions_train() -> None:
    algorithm = learner(task(3, continuous=True, unequal=True))
    for seed in range(2):
        updated(algorithm, synthetic(algorithm, seed))
    assert all(p.isfinite().all() for p in algorithm.parameters())


# --------------------------------------------------------------------------------------- (f) schedules, errors, state


def test_learning_rate_falls_in_a_line() -> None:
    algorithm = learner(lr=1e-3, lr_final=2e-4)
    rates = []
    for progress in (0.0, 0.25, 1.0, 1.2):
        algorithm.set_progress(progress)
        rates.append(algorithm.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 8e-4, 2e-4, 2e-4])


def test_constant_learning_rate() -> None:
    algorithm = learner(lr=1e-3, lr_final=1e-3)
    algorithm.set_progress(0.7)
    assert algorithm.optimiser.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gamma", 1.1),
        ("gamma", -0.1),
        ("gae_lambda", 2.0),
        ("clip", 0.0),
        ("lr", 0.0),
        ("max_grad_norm", -1.0),
        ("epochs", 0),
        ("minibatches", 0),
        ("value_clip", -0.2),
        ("value_coef", -1.0),
        ("entropy_coef", -0.1),
        ("lr_final", -1e-3),
        ("adam_eps", -1e-5),
    ],
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"algorithm\.{key}={value}"):
        learner(**{key: value})


@pytest.mark.parametrize("normalise", [True, False])
def test_densities_left_to_the_batch_are_those_of_the_policy_that_acted(normalise: bool) -> None:
    algorithm = learner(task(continuous=True), normalise_observations=normalise)
    assert not algorithm.actor.densities and K.log_prob in algorithm.learn_entries
    assert learner().actor.densities and K.log_prob not in learner().learn_entries
    updated(algorithm, synthetic(algorithm, 0))  # the statistics of observations are no longer those of the start
    batch = synthetic(algorithm, 1)
    algorithm.actor.densities = False
    acted = algorithm.actor.distribution(batch).log_prob(batch.get(K.action)).detach()
    assert not torch.allclose(batch.get(K.log_prob), acted)
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    assert torch.equal(batch.get(K.log_prob), acted)
    row = algorithm.actor(batch[0, 0].exclude(K.log_prob))
    assert row.get(K.log_prob, None) is None


def test_more_minibatches_than_rows_are_named() -> None:
    algorithm = learner(minibatches=49)
    algorithm.check_batch(49)
    with pytest.raises(ValueError, match="algorithm.minibatches=49"):
        algorithm.check_batch(48)


def test_minibatches_are_a_partition_in_every_epoch() -> None:
    algorithm = learner(epochs=3, minibatches=5)
    batch = synthetic(algorithm, 0)
    batch.get(K.observation)[..., 0] = torch.arange(48.0).reshape(12, 4, 1)
    parts = [td.get(K.observation)[:, 0, 0] for td in algorithm.minibatches(batch)]
    assert len(parts) == 15
    orders = [torch.cat(parts[5 * i : 5 * i + 5]) for i in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(48.0)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_first_step_leaves_no_metric_out_and_starts_at_ratio_one() -> None:
    algorithm = learner(epochs=1, minibatches=1)
    batch = synthetic(algorithm, 0)
    with torch.no_grad():
        batch.set(K.log_prob, algorithm.actor.distribution(batch).log_prob(batch.get(K.action)))
    algorithm.derive_rewards(batch)
    metrics = algorithm.compute_advantages(batch)
    (row,) = [algorithm.update(td) for td in algorithm.minibatches(batch)]
    assert row["policy/approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert row["policy/clip_fraction"].item() == 0
    assert row["loss/policy"].item() == pytest.approx(0, abs=1e-5)  # minus the mean normalised advantage
    assert all(torch.as_tensor(x).isfinite() for x in (*row.values(), *metrics.values()))
    assert row["grad_norm/actor"] > 0
    assert row["grad_norm/critic"] > 0


# ------------------------------------------------------------------------------------- one network for policy and value


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_one_network_for_both_steps_along_the_gradient_of_the_whole_loss(continuous: bool, shared: bool) -> None:
    """The same step as Adam's on a plain sum of the losses of two networks that happen to be one."""
    options = {"share_parameters": shared, "value_norm": False, "value_coef": 0.5, "max_grad_norm": 1e9}
    algorithm = learner(task(continuous=continuous), **options, share_body=True, epochs=1, minibatches=1)
    assert not list(algorithm.critic.parameters())
    batch = synthetic(algorithm, 0)
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    actor, before = algorithm.actor, copy.deepcopy(algorithm.actor)
    (rows,) = algorithm.minibatches(batch)
    draws = Generator()
    draws.set_state(algorithm.entropy_generator.get_state())
    row = algorithm.update(rows)

    output = before.body(before.input(rows.get(K.observation)))
    value, alive = output[..., -1:], rows.get(K.alive)
    torch.testing.assert_close(rows.get(K.value_output)[alive], value.detach()[alive])
    if continuous:
        policy: Any = TanhNormal(output[..., :-1], before.log_std, before.box)
    else:
        policy = MaskedCategorical(output[..., :-1], rows.get(K.action_mask))
    ratio = (policy.log_density(rows.get(K.action)) - rows.get(K.log_prob)).exp()
    advantage = rows.get(K.advantage)
    gained = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)[alive].mean()
    entropy = policy.entropy(draws)[alive].mean()
    error = ((value - rows.get(K.value_target)) ** 2)[alive].mean()
    optimiser = torch.optim.Adam(before.parameters(), lr=algorithm.lr, eps=1e-5)
    (-gained - algorithm.entropy_coef * entropy + 0.5 * error).backward()
    optimiser.step()
    for p, q in zip(actor.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    norm = torch.cat([p.grad.reshape(-1) for p in before.parameters() if p.grad is not None]).norm()
    assert row["grad_norm/actor"].item() == pytest.approx(norm.item(), rel=1e-4)
    assert row["loss/policy"].item() == pytest.approx(-gained.item(), abs=1e-5)
    assert "grad_norm/critic" not in row


def test_one_network_for_both_is_refused_beside_a_central_critic() -> None:
    with pytest.raises(ValueError, match=r"share_body=true needs algorithm\.centralised_critic=false"):
        learner(share_body=True, centralised_critic=True)


def test_stored_values_are_not_rewritten_by_gradient_steps() -> None:
    algorithm = learner()
    batch = synthetic(algorithm, 0)
    algorithm.derive_rewards(batch)
    algorithm.compute_advantages(batch)
    batch.lock_()
    before = batch.clone()
    for minibatch in algorithm.minibatches(batch):
        algorithm.update(minibatch)
    algorithm.finish_update(batch)
    assert (before == batch).all()


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("one_network", [False, True])
def test_a_restored_learner_continues_bit_for_bit(continuous: bool, one_network: bool) -> None:
    spec, options = task(continuous=continuous), {"normalise_observations": True, "scale_rewards": True}

    def go_on(algorithm: PPO, first: int) -> None:
        for seed in range(first, first + 5):
            algorithm.set_progress(seed / 20)
            updated(algorithm, synthetic(algorithm, seed))

    options["share_body"] = one_network
    original = learner(spec, share_parameters=True, **options)
    go_on(original, 0)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored = learner(spec, share_parameters=True, seed=99, **options)
    assert not same_parameters(original, restored)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    go_on(original, 5)
    go_on(restored, 5)
    assert same_parameters(original, restored)
    for key, x in original.state_dict().items():
        if isinstance(x, Tensor):
            assert torch.equal(x, restored.state_dict()[key]), key
    for name, generator in original._generators().items():
        assert torch.equal(generator.get_state(), restored._generators()[name].get_state()), name


def test_optimiser_state_goes_by_name() -> None:
    algorithm = learner()
    updated(algorithm, synthetic(algorithm, 0))
    extra = algorithm.get_extra_state()
    assert set(extra["optimiser"]) == {name for name, _ in algorithm.named_parameters()}
    other = learner()
    reordered = dict(reversed(extra["optimiser"].items()))
    other.set_extra_state(extra | {"optimiser": reordered})
    for name, slots in other.get_extra_state()["optimiser"].items():
        assert slots.keys() == extra["optimiser"][name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(x, extra["optimiser"][name][slot]) for slot, x in slots.items())
    with pytest.raises(KeyError, match="nobody.weight"):
        other.set_extra_state(extra | {"optimiser": {"nobody.weight": {}}})


def test_the_seed_decides_everything() -> None:
    def trained(seed: int) -> PPO:
        algorithm = learner(seed=seed)
        updated(algorithm, synthetic(algorithm, 0))
        return algorithm

    torch.manual_seed(0)
    first = trained(1)
    torch.manual_seed(1)
    assert same_parameters(first, trained(1))
    assert not same_parameters(first, trained(2))
