from __future__ import annotations

from sartor.serving.ending import Blame
from sartor.serving.lifecycle import KILLS_FORGIVEN, Death, Kill, Lifecycle, Start, Timing
from sartor.serving.worker import Pulse

TIMING = Timing(start=100, hang=10, starts=3, delay=1, longest_delay=3, retry=60)


def started(now: float = 0.0) -> Lifecycle:
    life = Lifecycle(TIMING, now)
    assert life.tick(now) == Start()
    return life


def ready(now: float = 0.0) -> Lifecycle:
    life = started(now)
    life.ready(now)
    return life


def test_starts_once_and_gets_ready() -> None:
    life = started()
    assert life.tick(1) is None
    life.ready(2)
    assert (life.phase, life.tick(3), life.retry_seconds(3)) == ("ready", None, None)


def test_a_useful_worker_comes_back_at_once() -> None:
    life = ready()
    for now in range(1, 6):
        life.worked()
        life.exited(now, "killed")
        assert life.cause == "killed"
        assert life.tick(now) == Start()
        life.ready(now)
    assert life.cause == ""


def test_one_that_dies_idly_again_and_again_is_delayed() -> None:
    life, now, delays = ready(), 0.0, []
    for _ in range(5):
        life.exited(now, "died")
        begin = now
        while life.tick(now) != Start():
            now += 0.5
        delays.append(now - begin)
        life.ready(now)
    assert delays == [0, 1, 2, 3, 3]


def test_failed_starts_are_delayed_and_then_given_up() -> None:
    life = started()
    life.exited(1, "no memory")
    assert (life.tick(1.9), life.tick(2)) == (None, Start())
    life.exited(3, "no memory")
    assert (life.tick(4.9), life.tick(5)) == (None, Start())
    life.exited(6, "no memory")
    assert life.retry_seconds(6) == 60
    assert (life.phase, life.cause, life.tick(1000)) == ("failed", "no memory", None)
    assert life.retry_seconds(1000) == 0


def test_a_request_long_after_gets_one_more_try() -> None:
    life = started()
    for now in (1, 2, 3):
        life.exited(now, "no memory")
        life.tick(now + 3)
    life.ensure(10)
    assert life.phase == "failed"
    life.ensure(70)
    assert life.tick(70) == Start()
    life.exited(71, "still none")
    assert (life.phase, life.cause) == ("failed", "still none")


def test_success_forgives_failed_starts() -> None:
    life = started()
    life.exited(1, "x")
    life.tick(5)
    life.ready(5)
    life.worked()
    life.exited(6, "y")
    life.tick(6)
    for now in (7, 20):
        life.exited(now, "z")
        assert life.phase == "waiting"
        life.tick(now + 10)


def test_an_endless_start_is_ended() -> None:
    life = started()
    assert life.tick(100) is None
    assert isinstance(life.tick(101), Kill)
    assert life.tick(102) is None, "one kill is enough"
    assert life.exited(103, "SIGKILL") == "start"
    assert "not ready" in life.cause


def test_silence_and_stuck_steps_are_hangs() -> None:
    silent = ready()
    silent.beat(5, 0)
    assert silent.tick(15) is None
    assert isinstance(silent.tick(15.1), Kill)
    stuck = ready()
    stuck.beat(20, 10.5)
    kill = stuck.tick(20)
    assert isinstance(kill, Kill)
    assert "stuck" in kill.cause
    stuck.exited(21, "killed by a signal")
    assert stuck.cause == kill.cause
    assert stuck.phase == "waiting"


def test_loading_needs_no_heartbeat() -> None:
    assert started().tick(99) is None


def test_kills_while_loading_are_no_failed_starts() -> None:
    life, now = started(), 0.0

    def die(blame: Blame) -> None:
        nonlocal now
        assert life.exited(now, "killed", blame) == "start"
        if life.phase == "waiting":
            now += TIMING.longest_delay
            assert life.tick(now) == Start()

    for _ in range(KILLS_FORGIVEN):
        die("outside")
    for phase in ("starting", "starting", "failed"):
        die("outside")
        assert life.phase == phase, "from here on they count"


def test_want_of_memory_while_loading_is_a_failed_start() -> None:
    life, now = started(), 0.0
    for _ in range(TIMING.starts):
        life.exited(now, "killed", "memory")
        now += TIMING.longest_delay
        life.tick(now)
    assert life.phase == "failed"


def test_deaths_are_told_apart() -> None:
    blames: dict[Blame, Death] = {"outside": "signal", "memory": "memory", "itself": "error"}
    for blame, death in blames.items():
        assert ready().exited(1, "x", blame) == death
    hung = ready()
    hung.tick(100)
    assert hung.exited(101, "x") == "hang"


def test_a_gateway_that_slept_blames_nobody() -> None:
    life = ready()
    life.beat(5, 0)
    life.excuse(200)
    assert life.tick(206) is None
    assert isinstance(life.tick(215.1), Kill), "from then on it counts"


def test_a_worker_that_slept_was_not_stuck() -> None:
    pulse = Pulse()
    pulse.excuse(100)
    assert pulse.stuck_seconds() == 0, "nobody watches yet"
    pulse.watch()
    pulse.excuse(100)
    assert pulse.stuck_seconds() == 0
    pulse.turn()
    pulse.excuse(-100)
    assert pulse.stuck_seconds() >= 100


def test_what_no_try_can_mend_is_given_up_at_once() -> None:
    life = started()
    assert life.exited(1, "no memory", final=True) == "start"
    assert (life.phase, life.cause) == ("failed", "no memory")
    # A worker was ready before: then something has happened, and may pass.
    life = ready()
    life.exited(1, "killed")
    assert life.tick(1) == Start()
    life.exited(2, "no file", final=True)
    assert life.phase == "waiting"
