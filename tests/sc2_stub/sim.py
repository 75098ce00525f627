"""A small combat simulation standing in for the StarCraft II engine.

It covers the nine unit types SMAC uses (and the spine crawler of one SMAC map):
moving, chasing, weapons with cooldowns, armour, bonus damage, shields, splash,
banelings that explode, medivacs that heal.  Numbers are close to patch 4.10 but
the result of a battle is not that of the real game.
"""

from __future__ import annotations

import dataclasses
import math
import random

LOOPS = 16.0  # game loops per game second
LIGHT, ARMORED, BIO, MECH = 1, 2, 3, 4  # as in data_pb2.Attribute
TERRAN, ZERG, PROTOSS = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Spec:
    name: str
    type_id: int
    race: int
    hp: float
    radius: float
    speed: float = 0.0  # distance per game second
    damage: float = 0.0
    hits: int = 1
    range: float = 0.0
    period: float = 1.0  # game seconds between attacks
    bonus: tuple = ()  # (attribute, extra damage)
    shield: float = 0.0
    armor: float = 0.0
    energy: float = 0.0
    energy_max: float = 0.0
    attributes: tuple = ()
    flying: bool = False
    hits_air: bool = False
    splash: float = 0.0
    explodes: bool = False
    heals: bool = False
    sight: float = 9.0


SPECS = {
    s.name: s
    for s in (
        Spec("marine", 48, TERRAN, 45, 0.375, 2.25, 6, 1, 5, 0.86, attributes=(LIGHT, BIO), hits_air=True),
        Spec(
            "marauder",
            51,
            TERRAN,
            125,
            0.5625,
            2.25,
            10,
            1,
            6,
            1.5,
            bonus=((ARMORED, 10),),
            armor=1,
            attributes=(ARMORED, BIO),
            sight=10,
        ),
        Spec(
            "medivac",
            54,
            TERRAN,
            150,
            0.75,
            3.5,
            range=4,
            armor=1,
            energy=50,
            energy_max=200,
            attributes=(ARMORED, MECH),
            flying=True,
            heals=True,
            sight=11,
        ),
        Spec("zealot", 73, PROTOSS, 100, 0.5, 3.15, 8, 2, 0.1, 1.2, shield=50, armor=1, attributes=(LIGHT, BIO)),
        Spec(
            "stalker",
            74,
            PROTOSS,
            80,
            0.625,
            4.13,
            13,
            1,
            6,
            1.87,
            bonus=((ARMORED, 5),),
            shield=80,
            armor=1,
            attributes=(ARMORED, MECH),
            hits_air=True,
            sight=10,
        ),
        Spec(
            "colossus",
            4,
            PROTOSS,
            200,
            1.0,
            3.15,
            10,
            2,
            7,
            1.5,
            bonus=((LIGHT, 5),),
            shield=150,
            armor=1,
            attributes=(ARMORED, MECH),
            splash=1.0,
            sight=10,
        ),
        Spec("zergling", 105, ZERG, 35, 0.375, 4.13, 5, 1, 0.1, 0.7, attributes=(LIGHT, BIO), sight=8),
        Spec("hydralisk", 107, ZERG, 90, 0.625, 3.15, 12, 1, 5, 0.83, attributes=(LIGHT, BIO), hits_air=True),
        Spec(
            "baneling",
            9,
            ZERG,
            30,
            0.375,
            3.5,
            16,
            1,
            0.25,
            0.83,
            bonus=((LIGHT, 19),),
            attributes=(BIO,),
            splash=2.2,
            explodes=True,
            sight=8,
        ),
        Spec(
            "spine",
            98,
            ZERG,
            300,
            0.9,
            0.0,
            25,
            1,
            7,
            1.85,
            bonus=((ARMORED, 5),),
            armor=2,
            attributes=(ARMORED, BIO),
            sight=11,
        ),
    )
}
# Names of the types that SMAC maps add for the learning side, in data order.
RL_ORDER = ("baneling", "colossus", "hydralisk", "marauder", "marine", "medivac", "stalker", "zealot", "zergling")
TABLE_SIZE = 1961  # built-in unit types; map types come right after them

# SMAC scenarios: (ally team, enemy team).  Team: ((count, unit, x, y), ...).
LEFT, RIGHT = (9, 16), (23, 16)


def _team(side, *parts):
    return tuple((count, unit, *side) for count, unit in parts)


def _marines(n, m):
    return _team(LEFT, (n, "marine")), _team(RIGHT, (m, "marine"))


SCENARIOS = {
    **{f"{n}m": _marines(n, n) for n in (3, 8, 25)},
    **{f"{n}m_vs_{m}m": _marines(n, m) for n, m in ((5, 6), (8, 9), (10, 11), (27, 30))},
    "MMM": (
        _team(LEFT, (7, "marine"), (2, "marauder"), (1, "medivac")),
        _team(RIGHT, (7, "marine"), (2, "marauder"), (1, "medivac")),
    ),
    "MMM2": (
        _team(LEFT, (7, "marine"), (2, "marauder"), (1, "medivac")),
        _team(RIGHT, (8, "marine"), (3, "marauder"), (1, "medivac")),
    ),
    "2s3z": (_team(LEFT, (2, "stalker"), (3, "zealot")), _team(RIGHT, (2, "stalker"), (3, "zealot"))),
    "3s5z": (_team(LEFT, (3, "stalker"), (5, "zealot")), _team(RIGHT, (3, "stalker"), (5, "zealot"))),
    "3s5z_vs_3s6z": (_team(LEFT, (3, "stalker"), (5, "zealot")), _team(RIGHT, (3, "stalker"), (6, "zealot"))),
    **{f"3s_vs_{n}z": (_team(LEFT, (3, "stalker")), _team(RIGHT, (n, "zealot"))) for n in (3, 4, 5)},
    "1c3s5z": (
        _team(LEFT, (1, "colossus"), (3, "stalker"), (5, "zealot")),
        _team(RIGHT, (1, "colossus"), (3, "stalker"), (5, "zealot")),
    ),
    "2m_vs_1z": (_team(LEFT, (2, "marine")), _team(RIGHT, (1, "zealot"))),
    "corridor": (_team((19, 19), (6, "zealot")), _team((27, 27), (24, "zergling"))),
    "6h_vs_8z": (_team(LEFT, (6, "hydralisk")), _team(RIGHT, (8, "zealot"))),
    "2s_vs_1sc": (_team(LEFT, (2, "stalker")), _team(RIGHT, (1, "spine"))),
    "so_many_baneling": (_team(LEFT, (7, "zealot")), _team(RIGHT, (32, "baneling"))),
    "bane_vs_bane": (
        ((20, "zergling", 16, 11), (4, "baneling", 16, 8)),
        ((20, "zergling", 16, 21), (4, "baneling", 16, 24)),
    ),
    "2c_vs_64zg": (_team(LEFT, (2, "colossus")), _team(RIGHT, (64, "zergling"))),
}
EMPTY_MAPS = (
    "32x32_flat",
    "32x32_flat_test",
    "32x32_small",
    "10gen_empty",
    "10gen_terran",
    "10gen_protoss",
    "10gen_zerg",
)
# Scenarios whose learning side smacv2 can only encode with the built-in type ids.
NEEDS_PLAIN_IDS = ("2s3z", "3s5z", "3s5z_vs_3s6z")


class Unit:
    __slots__ = (
        "spec",
        "tag",
        "owner",
        "type_id",
        "x",
        "y",
        "facing",
        "health",
        "shield",
        "energy",
        "cooldown",
        "order",
        "target",
        "goal",
        "last_hit",
        "born",
    )

    def __init__(self, spec, tag, owner, type_id, x, y, loop):
        self.spec, self.tag, self.owner, self.type_id = spec, tag, owner, type_id
        self.x, self.y = x, y
        self.facing = 0.0 if owner == 1 else math.pi
        self.health, self.shield, self.energy = spec.hp, spec.shield, spec.energy
        self.cooldown = 0.0
        self.order, self.target, self.goal = None, None, None  # move, attack, heal
        self.last_hit = -(10**6)
        self.born = loop


class World:
    """The state of one game.

    ``respawn``: "delayed" puts the teams of a SMAC map back ten loops after both
    are gone, "instant" in the same loop, as the triggers of the real maps do.
    ``ids``: "rl" gives the learning side the extra type ids of the real maps,
    "plain" the built-in ones, "auto" plain only where smacv2 needs it.
    ``enemy``: "attack" or "idle".
    """

    SIZE = 32
    RESPAWN_DELAY = 10

    def __init__(self, name, seed, respawn="delayed", ids="auto", enemy="attack", drop=0):
        self.name = name
        self.rng = random.Random(seed)
        self.respawn, self.enemy_mode = respawn, enemy
        self.scenario = SCENARIOS.get(name)
        self.flat = self.scenario is None
        used = {unit for team in self.scenario[:1] for _, unit, _, _ in team} if self.scenario else set(RL_ORDER)
        self.rl_names = [n for n in RL_ORDER if n in used]
        self.rl_ids = {n: TABLE_SIZE + i for i, n in enumerate(self.rl_names)}
        if self.scenario and (ids == "plain" or ids == "auto" and name in NEEDS_PLAIN_IDS):
            self.ally_ids = {n: SPECS[n].type_id for n in used}
        else:
            self.ally_ids = self.rl_ids
        self.type_to_spec = {s.type_id: s for s in SPECS.values()}
        self.type_to_spec.update({i: SPECS[n] for n, i in self.rl_ids.items()})
        low, high = (0, self.SIZE) if self.flat else (5, self.SIZE - 5)
        wide = name in ("corridor", "bane_vs_bane", "2c_vs_64zg", "so_many_baneling")
        if wide:
            low, high = 1, self.SIZE - 1
        left, right = (0, self.SIZE) if self.flat else (1, self.SIZE - 1)
        self.area = (left, low, right, high)
        self.path = [[left <= x < right and low <= y < high for x in range(self.SIZE)] for y in range(self.SIZE)]
        self.units: list[Unit] = []
        self.loop = 0
        self.made = 0
        self.kills: set[int] = set()
        self.creates: list[tuple] = []
        self.drop = drop
        self.empty_since = None
        self.deaths = [0, 0, 0]
        if self.scenario:
            self._spawn_teams()

    # -- placing units ----------------------------------------------------------

    def _spawn_teams(self):
        for owner, team in ((1, self.scenario[0]), (2, self.scenario[1])):
            for count, name, x, y in team:
                for _ in range(count):
                    type_id = self.ally_ids[name] if owner == 1 else SPECS[name].type_id
                    self._place(SPECS[name], owner, type_id, x, y)
        for unit in self.units:
            if unit.owner == 2:
                unit.goal = (self.scenario[0][0][2], self.scenario[0][0][3])

    def _free(self, spec, x, y):
        if not self._passable(spec, x, y):
            return False
        return all(
            u.spec.flying != spec.flying or math.hypot(u.x - x, u.y - y) >= u.spec.radius + spec.radius
            for u in self.units
        )

    def _place(self, spec, owner, type_id, x, y):
        """Put a unit at the free spot nearest to (x, y), along a spiral."""
        edge = 0.05
        x = min(max(x, self.area[0] + edge), self.area[2] - edge)
        y = min(max(y, self.area[1] + edge), self.area[3] - edge)
        px, py = x, y
        angle = self.rng.random() * math.tau
        for k in range(4000):
            if self._free(spec, px, py):
                break
            r = 0.12 * math.sqrt(k + 1) * 2.0
            a = angle + k * 2.399963
            px, py = x + r * math.cos(a), y + r * math.sin(a)
        else:
            px, py = x, y
        tag = (1 << 32) + (self.made << 18) + 1
        self.made += 1
        self.units.append(Unit(spec, tag, owner, type_id, px, py, self.loop))

    def create(self, type_id, owner, x, y, count):
        spec = self.type_to_spec.get(type_id)
        if spec is None or owner not in (1, 2):
            return False
        for _ in range(count):
            if self.drop > 0:
                self.drop -= 1
                continue
            self.creates.append((spec, owner, type_id, x, y))
        return True

    # -- geometry ---------------------------------------------------------------

    def _passable(self, spec, x, y):
        if not (0 <= x < self.SIZE and 0 <= y < self.SIZE):
            return False
        return spec.flying or self.path[int(y)][int(x)]

    @staticmethod
    def _gap(a, b):
        return math.hypot(a.x - b.x, a.y - b.y) - a.spec.radius - b.spec.radius

    def _walk(self, unit, x, y, stop=0.0):
        dx, dy = x - unit.x, y - unit.y
        dist = math.hypot(dx, dy)
        if dist <= max(stop, 1e-6):
            return True
        step = min(unit.spec.speed / LOOPS, dist - stop)
        if step <= 0:
            return True
        unit.facing = math.atan2(dy, dx)
        mx, my = dx / dist * step, dy / dist * step
        for nx, ny in ((unit.x + mx, unit.y + my), (unit.x + mx, unit.y), (unit.x, unit.y + my)):
            if self._passable(unit.spec, nx, ny):
                unit.x, unit.y = nx, ny
                break
        else:
            return True  # blocked on every side: give up
        return math.hypot(x - unit.x, y - unit.y) <= max(stop, 1e-3)

    def _push_apart(self):
        units = self.units
        for i, a in enumerate(units):
            for b in units[i + 1 :]:
                if a.spec.flying != b.spec.flying:
                    continue
                reach = a.spec.radius + b.spec.radius
                dx, dy = b.x - a.x, b.y - a.y
                if abs(dx) >= reach or abs(dy) >= reach:
                    continue
                dist = math.hypot(dx, dy)
                if dist >= reach:
                    continue
                if dist < 1e-6:
                    dx, dy, dist = math.cos(a.tag + 0.7), math.sin(a.tag + 0.7), 1.0
                    over = reach
                else:
                    over = reach - dist
                move = over * 0.25
                for unit, sign in ((a, -1), (b, 1)):
                    if unit.spec.speed == 0:
                        continue
                    nx, ny = unit.x + sign * dx / dist * move, unit.y + sign * dy / dist * move
                    if self._passable(unit.spec, nx, ny):
                        unit.x, unit.y = nx, ny

    # -- orders -----------------------------------------------------------------

    @staticmethod
    def can_hit(spec, target):
        return spec.damage > 0 and (spec.hits_air or not target.spec.flying)

    @staticmethod
    def can_heal(spec, unit, target):
        return spec.heals and target is not unit and target.owner == unit.owner and BIO in target.spec.attributes

    def command(self, unit, kind, target=None, point=None):
        """Order a unit.  False when it cannot carry out the order."""
        unit.order, unit.target, unit.goal = None, None, None
        if kind == "stop":
            return True
        if kind == "move" and target is None and point is None:
            return False
        if kind == "move":
            unit.order = "move"
            unit.goal = point or (target.x, target.y)
            return True
        if kind == "attack":
            if target is None:
                unit.order, unit.goal = "attack", point
                return point is not None
            if not self.can_hit(unit.spec, target):
                return False
        elif kind == "heal":
            if target is None or not self.can_heal(unit.spec, unit, target):
                return False
        else:
            return False
        unit.order, unit.target = kind, target.tag
        return True

    def _enemy_orders(self, alive):
        allies = [u for u in self.units if u.owner == 1]
        for unit in self.units:
            if unit.owner != 2:
                continue
            if unit.spec.heals:
                self._medic_orders(unit)
                continue
            current = alive.get(unit.target)
            targets = [t for t in allies if self.can_hit(unit.spec, t)]
            if not targets:
                unit.target = None
                continue
            best = min(targets, key=lambda t: (self._gap(unit, t), t.tag))
            if self.flat:
                # a trigger of the map sends idle units at the closest opponent
                if current is None and self.loop % 8 == 0:
                    unit.order, unit.target = "attack", best.tag
            else:
                sight = max(unit.spec.range + 1.5, 6.0)
                hit = self.loop - unit.last_hit < 32
                if self._gap(unit, best) <= sight or (hit and current is None):
                    in_range = current is not None and self._gap(unit, current) <= unit.spec.range
                    if not in_range:
                        unit.order, unit.target = "attack", best.tag
                elif current is None:
                    unit.target, unit.order = None, "attack"

    def _medic_orders(self, unit):
        friends = [f for f in self.units if f.owner == unit.owner and not f.spec.heals]
        if not friends:
            unit.order, unit.target = None, None
            return
        hurt = [f for f in friends if f.health < f.spec.hp and self.can_heal(unit.spec, unit, f)]
        if hurt and unit.energy >= 1:
            best = min(hurt, key=lambda f: (self._gap(unit, f), f.tag))
            unit.order, unit.target = "heal", best.tag
        else:
            best = min(friends, key=lambda f: (self._gap(unit, f), f.tag))
            unit.order, unit.target, unit.goal = "move", None, (best.x, best.y)

    # -- one game loop ----------------------------------------------------------

    def step(self, count):
        for _ in range(count):
            self._tick()

    def _tick(self):
        self.loop += 1
        if self.kills:
            self._bury([u for u in self.units if u.tag in self.kills])
            self.kills.clear()
        for args in self.creates:
            self._place(*args)
        self.creates.clear()
        alive = {u.tag: u for u in self.units}
        if self.enemy_mode != "idle":
            self._enemy_orders(alive)
        hits = []  # (attacker, target, factor)
        exploded = []
        for unit in self.units:
            unit.cooldown = max(0.0, unit.cooldown - 1.0)
            self._act(unit, alive, hits, exploded)
        for attacker, target, factor in hits:
            self._hurt(attacker.spec, target, factor)
        self._bury([u for u in self.units if u.health <= 0 or u in exploded])
        self._push_apart()
        for unit in self.units:
            self._recover(unit)
        self._map_trigger()

    def _act(self, unit, alive, hits, exploded):
        if unit.order == "move":
            if unit.goal is None or self._walk(unit, *unit.goal):
                unit.order = unit.goal = None
            return
        if unit.order == "attack":
            target = alive.get(unit.target)
            if target is None:
                unit.target = None
                if unit.owner == 1 and unit.goal is None:
                    unit.order = None
                elif unit.goal is not None:
                    self._walk(unit, *unit.goal, stop=0.5)
                return
            if self._gap(unit, target) > unit.spec.range:
                self._walk(unit, target.x, target.y, unit.spec.range + unit.spec.radius + target.spec.radius - 0.02)
            elif unit.cooldown <= 0:
                unit.facing = math.atan2(target.y - unit.y, target.x - unit.x)
                unit.cooldown = unit.spec.period * LOOPS + self.rng.uniform(-1.0, 1.0)
                self._fire(unit, target, hits, exploded)
            return
        if unit.order == "heal":
            target = alive.get(unit.target)
            if target is None:
                unit.order = unit.target = None
            elif self._gap(unit, target) > unit.spec.range:
                self._walk(unit, target.x, target.y, unit.spec.range + unit.spec.radius + target.spec.radius - 0.02)
            elif target.health < target.spec.hp and unit.energy > 0:
                amount = min(9.0 / LOOPS, target.spec.hp - target.health, unit.energy * 3.0)
                target.health += amount
                unit.energy -= amount / 3.0

    def _fire(self, unit, target, hits, exploded):
        spec = unit.spec
        if spec.explodes:
            exploded.append(unit)
            centre, radius = unit, spec.splash
        else:
            hits.append((unit, target, 1.0))
            centre, radius = target, spec.splash
        if radius:
            for other in self.units:
                if other.owner == unit.owner or other.spec.flying:
                    continue
                if other is target and not spec.explodes:
                    continue
                if math.hypot(other.x - centre.x, other.y - centre.y) <= radius:
                    hits.append((unit, other, 1.0))

    def _hurt(self, spec, target, factor):
        if target.health <= 0:
            return
        target.last_hit = self.loop
        amount = spec.damage + sum(v for a, v in spec.bonus if a in target.spec.attributes)
        for _ in range(spec.hits):
            left = amount * factor
            absorbed = min(target.shield, left)
            target.shield -= absorbed
            left -= absorbed
            if left > 0:
                target.health -= max(left - target.spec.armor, 0.5)

    def _bury(self, dead):
        if not dead:
            return
        for unit in dead:
            self.deaths[unit.owner] += 1
        gone = {u.tag for u in dead}
        self.units = [u for u in self.units if u.tag not in gone]

    def _recover(self, unit):
        spec = unit.spec
        if unit.shield < spec.shield and self.loop - unit.last_hit > 10 * LOOPS:
            unit.shield = min(spec.shield, unit.shield + 2.0 / LOOPS)
        if spec.race == ZERG and unit.health < spec.hp:
            unit.health = min(spec.hp, unit.health + 0.2734 / LOOPS)
        if spec.energy_max:
            unit.energy = min(spec.energy_max, unit.energy + 0.5625 / LOOPS)

    def _map_trigger(self):
        if self.flat:
            return
        if self.units:
            self.empty_since = None
            return
        if self.empty_since is None:
            self.empty_since = self.loop
        wait = 0 if self.respawn == "instant" else self.RESPAWN_DELAY
        if self.loop - self.empty_since >= wait:
            self.empty_since = None
            self._spawn_teams()
