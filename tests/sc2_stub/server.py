"""A stand-in for the StarCraft II binary: websocket, protobuf, a small battle.

Started the way pysc2 starts the game (``SC2_x64 -listen H -port P ...``, see
``make_sc2path.py``).  It answers the requests smacv2 makes and a few more.

Environment variables
  SC2_STUB_SEED=N         seed of the battle; otherwise the random_seed of
                          create_game; otherwise a different one every time
  SC2_STUB_ENEMY=idle     enemies do nothing (episodes run into the time limit)
  SC2_STUB_RESPAWN        delayed (default) or instant.  The real SMAC maps respawn
                          instantly, which makes the second reset() of unmodified
                          smacv2 loop for ever (its issues 2 and 55)
  SC2_STUB_IDS            auto (default), rl or plain: type ids of the learning side
                          on SMAC maps.  The real maps use their own ("rl"), with
                          which unmodified smacv2 stops with IndexError on the
                          maps of stalkers and zealots; "auto" uses plain ids there
  SC2_STUB_REAL_MAPS=1    short for RESPAWN=instant and IDS=rl
  SC2_STUB_SLOW_START=S   wait S seconds before listening
  SC2_STUB_SLOW_STEP=MS   wait MS milliseconds in every step request
  SC2_STUB_LOG=FILE       append one line per request

Faults (N counts the step requests of this process, from 1)
  SC2_STUB_CRASH_AFTER=N  exit abruptly at request N, without an answer
  SC2_STUB_HANG_AFTER=N   never answer again from request N on
  SC2_STUB_ERROR_AFTER=N  answer request N with an error
  SC2_STUB_CRASH_ON=NAME  exit at the first request of that name (e.g. join_game)
  SC2_STUB_DROP_CREATES=K the first K units asked for by debug commands never appear
  SC2_STUB_LAUNCH_FAIL=1  exit before listening
  SC2_STUB_IGNORE_TERM=1  ignore SIGTERM
  SC2_STUB_FAULT_LATCH=FILE  faults happen SC2_STUB_FAULT_MAX times (default 1) in
                          all the processes that share FILE; without it every new
                          process has its fault
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import random
import signal
import socket
import struct
import sys
import time

# The compiled runtime works here (see smac_protos) and is faster.
os.environ.pop("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", None)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import sim  # noqa: E402

from marl_memory_envs.smac_protos import ensure  # noqa: E402

ensure()

from s2clientprotocol import common_pb2 as pb_common  # noqa: E402
from s2clientprotocol import error_pb2 as pb_error  # noqa: E402
from s2clientprotocol import sc2api_pb2 as pb  # noqa: E402

VERSION, BUILD = "4.10.0.75689", 75689
ABILITIES = {4: "stop", 16: "move", 23: "attack", 386: "heal", 3665: "stop", 3674: "attack", 3794: "move", 1: "smart"}
CRASH_CODE = 66


def env(name, default=None, kind=str):
    value = os.environ.get("SC2_STUB_" + name, "")
    return kind(value) if value != "" else default


# -- websocket ------------------------------------------------------------------


class Closed(Exception):
    """The client went away."""


class Channel:
    """The server side of one websocket connection (RFC 6455)."""

    MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

    def __init__(self, sock, idle):
        self.sock, self.idle, self.buf = sock, idle, b""
        sock.settimeout(1.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _more(self):
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except TimeoutError:
                self.idle()
                continue
            except OSError as err:
                raise Closed from err
            if not data:
                raise Closed
            self.buf += data
            return

    def _take(self, count):
        while len(self.buf) < count:
            self._more()
        data, self.buf = self.buf[:count], self.buf[count:]
        return data

    def handshake(self):
        while b"\r\n\r\n" not in self.buf:
            self._more()
            if len(self.buf) > 1 << 16:
                raise Closed
        head, self.buf = self.buf.split(b"\r\n\r\n", 1)
        lines = head.split(b"\r\n")
        fields = {}
        for line in lines[1:]:
            key, _, value = line.partition(b":")
            fields[key.strip().lower()] = value.strip()
        words = lines[0].split()
        key = fields.get(b"sec-websocket-key")
        if len(words) < 2 or words[1] != b"/sc2api" or key is None:
            self._raw(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            raise Closed
        accept = base64.b64encode(hashlib.sha1(key + self.MAGIC).digest())
        self._raw(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )

    def _raw(self, data):
        try:
            self.sock.settimeout(60.0)
            self.sock.sendall(data)
            self.sock.settimeout(1.0)
        except OSError as err:
            raise Closed from err

    def _frame(self, code, data):
        size = len(data)
        head = bytes([0x80 | code])
        if size < 126:
            head += bytes([size])
        elif size < 1 << 16:
            head += b"\x7e" + struct.pack(">H", size)
        else:
            head += b"\x7f" + struct.pack(">Q", size)
        self._raw(head + data)

    def send(self, data):
        self._frame(2, data)

    def receive(self):
        message = b""
        while True:
            first, second = self._take(2)
            size = second & 0x7F
            if size == 126:
                size = struct.unpack(">H", self._take(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", self._take(8))[0]
            key = self._take(4) if second & 0x80 else None
            data = self._take(size)
            if key and size:
                pad = (key * (size // 4 + 1))[:size]
                data = (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")
            code = first & 0x0F
            if code == 8:
                self._frame(8, data)
                raise Closed
            if code == 9:
                self._frame(10, data)
            elif code in (0, 1, 2):
                message += data
                if first & 0x80:
                    return message

    def close(self):
        self.sock.close()


# -- faults ---------------------------------------------------------------------


class Faults:
    def __init__(self):
        self.crash_after = env("CRASH_AFTER", None, int)
        self.hang_after = env("HANG_AFTER", None, int)
        self.error_after = env("ERROR_AFTER", None, int)
        self.crash_on = env("CRASH_ON")
        self.latch = env("FAULT_LATCH")
        self.limit = env("FAULT_MAX", 1, int)
        self.to_drop = env("DROP_CREATES", 0, int)
        self.steps = 0

    def drops(self):
        """How many created units the first game of this process loses."""
        count, self.to_drop = self.to_drop, 0
        return count if count and self._armed("drop") else 0

    def _armed(self, what):
        """Whether a fault may still happen; counts it when it may."""
        if self.latch:
            try:
                with open(self.latch, encoding="utf-8") as file:
                    fired = len(file.readlines())
            except FileNotFoundError:
                fired = 0
            if fired >= self.limit:
                return False
            with open(self.latch, "a", encoding="utf-8") as file:
                file.write(f"{what} pid={os.getpid()} step={self.steps}\n")
        return True

    def before(self, name, idle):
        """Crash or hang here; or return the text of an error to answer with."""
        if self.crash_on == name and self._armed("crash on " + name):
            os._exit(CRASH_CODE)
        if name != "step":
            return None
        self.steps += 1
        if self.steps == self.crash_after and self._armed("crash"):
            os._exit(CRASH_CODE)
        if self.steps == self.hang_after and self._armed("hang"):
            while True:
                idle()
                time.sleep(0.5)
        if self.steps == self.error_after and self._armed("error"):
            return "injected error"
        return None


# -- the game -------------------------------------------------------------------


class Refused(Exception):
    """A request that is wrong in the present state."""


class Game:
    def __init__(self, data_dir, faults):
        self.data_dir, self.faults = data_dir, faults
        self.clear()

    def clear(self):
        self.status = pb.launched
        self.world = None
        self.map_path = ""
        self.request = None
        self.race = pb_common.Random
        self.seed = 0
        self.journal = []

    def _need(self, *states):
        if self.status not in states:
            raise Refused("not possible in state " + pb.Status.Name(self.status))

    def on_ping(self, req, res):
        res.game_version, res.data_version = VERSION, "STUB"
        res.data_build = res.base_build = BUILD

    def on_available_maps(self, req, res):
        folder = os.path.join(self.data_dir, "Maps", "SMAC_Maps")
        if os.path.isdir(folder):
            res.local_map_paths.extend("SMAC_Maps/" + n for n in sorted(os.listdir(folder)) if n.endswith(".SC2Map"))

    def on_create_game(self, req, res):
        self._need(pb.launched, pb.ended, pb.in_game)
        path = req.local_map.map_path
        name = os.path.basename(path.replace("\\", "/"))
        name = name[: -len(".SC2Map")] if name.endswith(".SC2Map") else name
        if not path:
            res.error = pb.ResponseCreateGame.MissingMap
            return
        if name not in sim.SCENARIOS and name not in sim.EMPTY_MAPS:
            res.error = pb.ResponseCreateGame.InvalidMapPath
            res.error_details = "the stand-in has no map " + name
            return
        if not req.player_setup:
            res.error = pb.ResponseCreateGame.InvalidPlayerSetup
            return
        self.clear()
        self.map_path, self.map_name = path, name
        self.request = req
        self.status = pb.init_game

    def on_join_game(self, req, res):
        self._need(pb.launched, pb.init_game)
        if self.request is None:
            res.error = pb.ResponseJoinGame.GameFullError
            return
        seed = env("SEED", None, int)
        if seed is None and self.request.HasField("random_seed"):
            seed = self.request.random_seed
        if seed is None:
            seed = random.SystemRandom().getrandbits(31)
        self.seed = seed
        self.race = req.race
        self._start()
        res.player_id = 1

    def _start(self):
        real = env("REAL_MAPS") == "1"
        self.world = sim.World(
            self.map_name,
            self.seed,
            respawn=env("RESPAWN", "instant" if real else "delayed"),
            ids=env("IDS", "rl" if real else "auto"),
            enemy=env("ENEMY", "attack"),
            drop=self.faults.drops(),
        )
        self.journal = []
        self.status = pb.in_game

    def on_restart_game(self, req, res):
        self._need(pb.in_game, pb.ended)
        self._start()

    def on_leave_game(self, req, res):
        self._need(pb.in_game, pb.ended)
        self.clear()

    def on_quit(self, req, res):
        self.status = pb.quit

    def on_game_info(self, req, res):
        self._need(pb.in_game)
        world = self.world
        res.map_name, res.local_map_path = world.name, self.map_path
        for number, setup in enumerate(self.request.player_setup, 1):
            info = res.player_info.add()
            info.player_id, info.type = number, setup.type
            if setup.type == pb.Participant:
                info.race_requested = info.race_actual = self.race
            else:
                info.race_requested, info.difficulty = setup.race, setup.difficulty
        start, size = res.start_raw, world.SIZE
        start.map_size.x = start.map_size.y = size
        bits = bytearray()
        for row in world.path:
            for k in range(0, size, 8):
                value = 0
                for cell in row[k : k + 8]:  # most significant bit first
                    value = value << 1 | int(cell)
                bits.append(value)
        for image in (start.pathing_grid, start.placement_grid):
            image.bits_per_pixel, image.data = 1, bytes(bits)
            image.size.x = image.size.y = size
        start.terrain_height.bits_per_pixel = 8
        start.terrain_height.size.x = start.terrain_height.size.y = size
        start.terrain_height.data = bytes(127 + x // 8 - y // 16 for y in range(size) for x in range(size))
        x0, y0, x1, y1 = world.area
        start.playable_area.p0.x, start.playable_area.p0.y = x0, y0
        start.playable_area.p1.x, start.playable_area.p1.y = x1, y1
        start.start_locations.add(x=23.0, y=16.0)
        res.options.raw = True

    def on_data(self, req, res):
        self._need(pb.in_game)
        world = self.world
        if req.ability_id:
            for number, name in ABILITIES.items():
                res.abilities.add(
                    ability_id=number,
                    link_name=name,
                    button_name=name.title(),
                    friendly_name=name.title(),
                    available=True,
                )
        if not req.unit_type_id:
            return
        for number in range(sim.TABLE_SIZE + len(world.rl_names)):
            unit = res.units.add(unit_id=number)
            spec = world.type_to_spec.get(number)
            if spec is None:
                unit.name = f"unit{number}" if number else ""
                unit.available = False
                continue
            unit.name = spec.name.title() + ("_RL" if number >= sim.TABLE_SIZE else "")
            unit.available = True
            unit.race, unit.armor, unit.sight_range = spec.race, spec.armor, spec.sight
            unit.movement_speed = spec.speed
            unit.attributes.extend(spec.attributes)
            if spec.damage:
                gun = unit.weapons.add(damage=spec.damage, attacks=spec.hits, range=spec.range, speed=spec.period)
                gun.type = gun.TargetType.Value("Any" if spec.hits_air else "Ground")
                for attribute, extra in spec.bonus:
                    gun.damage_bonus.add(attribute=attribute, bonus=extra)

    def on_observation(self, req, res):
        self._need(pb.in_game, pb.ended)
        world, obs = self.world, res.observation
        obs.game_loop = world.loop
        common = obs.player_common
        common.player_id = 1
        common.army_count = sum(u.owner == 1 for u in world.units)
        raw = obs.raw_data
        raw.player.camera.x = raw.player.camera.y = world.SIZE / 2
        for u in world.units:
            spec = u.spec
            unit = raw.units.add(
                display_type=1,
                alliance=1 if u.owner == 1 else 4,
                tag=u.tag,
                unit_type=u.type_id,
                owner=u.owner,
                facing=u.facing % 6.283185307,
                radius=spec.radius,
                build_progress=1.0,
                cloak=3,
                health=u.health,
                health_max=spec.hp,
                shield=u.shield,
                shield_max=spec.shield,
                energy=u.energy,
                energy_max=spec.energy_max,
                is_flying=spec.flying,
                is_burrowed=False,
                is_on_screen=True,
                is_selected=False,
                is_blip=False,
                is_active=u.order is not None,
                weapon_cooldown=u.cooldown,
            )
            unit.pos.x, unit.pos.y = u.x, u.y
            unit.pos.z = 15.0 if spec.flying else 12.0
            if u.order and u.owner == 1:
                order = unit.orders.add(ability_id={"move": 16, "attack": 23, "heal": 386}[u.order])
                if u.target is not None:
                    order.target_unit_tag = u.target
                elif u.goal is not None:
                    order.target_world_space_pos.x, order.target_world_space_pos.y = u.goal
            if u.order == "attack" and u.target is not None:
                unit.engaged_target_tag = u.target

    def on_step(self, req, res):
        self._need(pb.in_game)
        slow = env("SLOW_STEP", 0.0, float)
        if slow:
            time.sleep(slow / 1000.0)
        self.world.step(max(1, req.count))
        res.simulation_loop = self.world.loop

    def on_action(self, req, res):
        self._need(pb.in_game)
        fail = pb_error.ActionResult.Value("Error")
        units = {u.tag: u for u in self.world.units}
        for action in req.actions:
            cmd = action.action_raw.unit_command
            kind = ABILITIES.get(cmd.ability_id)
            target = point = None
            which = cmd.WhichOneof("target")
            good = kind is not None
            if which == "target_unit_tag":
                target = units.get(cmd.target_unit_tag)
                good = good and target is not None
            elif which == "target_world_space_pos":
                point = (cmd.target_world_space_pos.x, cmd.target_world_space_pos.y)
            done = 0
            for tag in cmd.unit_tags:
                unit = units.get(tag)
                if not good or unit is None or unit.owner != 1:
                    continue
                order = kind
                if kind == "smart":
                    order = "attack" if target is not None and target.owner != 1 else "move"
                done += self.world.command(unit, order, target, point)
            self.journal.append([self.world.loop, list(cmd.unit_tags), cmd.ability_id])
            res.result.append(pb_error.Success if done else fail)

    def on_debug(self, req, res):
        self._need(pb.in_game)
        for command in req.debug:
            what = command.WhichOneof("command")
            if what == "kill_unit":
                self.world.kills.update(command.kill_unit.tag)
            elif what == "create_unit":
                new = command.create_unit
                if not self.world.create(new.unit_type, new.owner, new.pos.x, new.pos.y, max(1, new.quantity)):
                    raise Refused(f"unknown unit type {new.unit_type} or owner {new.owner}")
            elif what == "unit_value":
                for u in self.world.units:
                    if u.tag == command.unit_value.unit_tag:
                        field = {1: "energy", 2: "health", 3: "shield"}.get(command.unit_value.unit_value)
                        if field:
                            setattr(u, field, command.unit_value.value)
            elif what == "end_game":
                self.status = pb.ended
            # drawing, cameras and the like have no effect here

    def on_query(self, req, res):
        self._need(pb.in_game)
        units = {u.tag: u for u in self.world.units}
        for query in req.pathing:
            x, y = query.start_pos.x, query.start_pos.y
            if query.WhichOneof("start") == "unit_tag" and query.unit_tag in units:
                x, y = units[query.unit_tag].x, units[query.unit_tag].y
            res.pathing.add(distance=((query.end_pos.x - x) ** 2 + (query.end_pos.y - y) ** 2) ** 0.5)
        for query in req.abilities:
            answer = res.abilities.add(unit_tag=query.unit_tag)
            unit = units.get(query.unit_tag)
            if unit:
                answer.unit_type_id = unit.type_id
                for number in (4, 16, 386 if unit.spec.heals else 23):
                    answer.abilities.add(ability_id=number)
        for _ in req.placements:
            res.placements.add(result=pb_error.Success)

    def on_save_replay(self, req, res):
        self._need(pb.in_game, pb.ended)
        body = json.dumps(
            {"map": self.map_name, "seed": self.seed, "loops": self.world.loop, "actions": self.journal}
        ).encode()
        res.data = b"SC2-STUB-REPLAY\n" + gzip.compress(body, mtime=0)

    def answer(self, request, name):
        response = pb.Response()
        if request.HasField("id"):
            response.id = request.id
        handler = getattr(self, "on_" + str(name), None)
        if handler is None:
            response.error.append(f"the stand-in does not know the request {name}")
        else:
            part = getattr(response, name)
            part.SetInParent()
            try:
                handler(getattr(request, name), part)
            except Refused as err:
                response.error.append(f"{name}: {err}")
        response.status = self.status
        return response


# -- main -----------------------------------------------------------------------


def parse(argv):
    host, port, data_dir = "127.0.0.1", None, "."
    for flag, value in zip(argv, argv[1:], strict=False):
        if flag == "-listen":
            host = value
        elif flag == "-port":
            port = int(value)
        elif flag == "-dataDir":
            data_dir = value
    if port is None:
        raise SystemExit("usage: server.py -listen HOST -port PORT [-dataDir DIR]")
    return host, port, data_dir


def main():
    host, port, data_dir = parse(sys.argv[1:])
    if env("LAUNCH_FAIL") == "1":
        raise SystemExit("SC2_STUB_LAUNCH_FAIL is set")
    if env("IGNORE_TERM") == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()

    def idle():
        if os.getppid() != parent:  # whoever started us is gone
            os._exit(0)

    time.sleep(env("SLOW_START", 0.0, float))
    faults, log_path = Faults(), env("LOG")
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.settimeout(1.0)
    while True:
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            idle()
            continue
        channel = Channel(sock, idle)
        game = Game(data_dir, faults)
        try:
            channel.handshake()
            while True:
                request = pb.Request.FromString(channel.receive())
                name = request.WhichOneof("request")
                if log_path:
                    with open(log_path, "a", encoding="utf-8") as file:
                        file.write(f"{os.getpid()} {name}\n")
                error = faults.before(name, idle)
                if error:
                    response = pb.Response(status=game.status, error=[error])
                    if request.HasField("id"):
                        response.id = request.id
                else:
                    response = game.answer(request, name)
                channel.send(response.SerializeToString())
                if game.status == pb.quit:
                    return
        except Closed:
            pass
        finally:
            channel.close()


if __name__ == "__main__":
    main()
