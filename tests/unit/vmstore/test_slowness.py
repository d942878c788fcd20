"""Who is slow, who is left behind for it, and when it may come back."""

from vmstore.slowness import LONGEST_REST_S, SlowLimits, Slowness

LIMITS = SlowLimits(report_ms=200, leave_behind_ms=2000, for_s=10, back_after_s=60)


def told(slowness: Slowness, lags: list[int], since_s: float, node: str = "b") -> float:
    """One second of lag after the other; returns the time."""
    for lag_ms in lags:
        since_s += 1
        slowness.heard({"a": 0, node: lag_ms}, since_s)
    return since_s


def test_node_is_slow_after_a_while_and_quick_again_well_below_the_limit() -> None:
    slowness = Slowness(LIMITS)
    now_s = told(slowness, [300] * 6, 0)
    assert slowness.slow() == {}
    now_s = told(slowness, [300] * 4, now_s)
    assert slowness.slow() == {"b": 300}
    assert slowness.too_slow(["a", "b"], now_s) is None
    now_s = told(slowness, [150] * 12, now_s)
    assert slowness.slow() == {"b": 150}, "not yet: it would flap"
    told(slowness, [20] * 12, now_s)
    assert slowness.slow() == {}


def test_hiccups_and_idle_seconds_make_no_node_slow() -> None:
    slowness = Slowness(LIMITS)
    now_s = told(slowness, [0] * 10, 0)
    now_s = told(slowness, [1500, 0, 0, 0, 0, 0, 0, 0, 0], now_s)
    assert slowness.slow() == {}
    slowness.heard({"b": 9000}, now_s + 100)
    slowness.heard({"b": 9000}, now_s + 101)
    assert slowness.slow() == {} and slowness.too_slow(["b"], now_s + 101) is None


def test_slow_node_that_nobody_asks_is_not_told_for_ever() -> None:
    slowness = Slowness(LIMITS)
    now_s = told(slowness, [300] * 11, 0)
    assert slowness.slow()
    slowness.look(now_s + 11)
    assert slowness.slow() == {}


def test_one_request_that_hangs_makes_its_node_too_slow() -> None:
    slowness = Slowness(LIMITS)
    now_s = told(slowness, [1000 * second for second in range(1, 10)], 0)
    assert slowness.too_slow(["a", "b"], now_s) == "b"
    assert slowness.too_slow(["a"], now_s) is None
    never = Slowness(SlowLimits(leave_behind_ms=0))
    assert never.too_slow(["b"], told(never, [9000] * 12, 0)) is None


def test_rest_is_twice_as_long_each_time_and_forgotten_after_good_conduct() -> None:
    slowness = Slowness(LIMITS)
    now_s, rests = 0.0, []
    for _ in range(9):
        slowness.left_behind("b", now_s)
        rest_s = slowness.resting(now_s)["b"]
        assert slowness.rests("b", now_s + rest_s - 1) and not slowness.rests("b", now_s + rest_s)
        rests.append(rest_s)
        now_s += rest_s + 30
        slowness.look(now_s)
    assert rests[:4] == [60, 120, 240, 480] and rests[-1] == LONGEST_REST_S
    slowness.look(now_s + 11 * LONGEST_REST_S)
    slowness.left_behind("b", now_s + 11 * LONGEST_REST_S)
    assert slowness.resting(now_s + 11 * LONGEST_REST_S)["b"] == 60


def test_what_a_former_connection_answered_does_not_count() -> None:
    slowness = Slowness(LIMITS)
    now_s = told(slowness, [3000] * 10, 0)
    assert slowness.too_slow(["b"], now_s) == "b"
    slowness.gone("b")
    assert slowness.slow() == {} and slowness.too_slow(["b"], now_s) is None
