"""The search for the most accurate model within a budget: on made-up clocks, whose answers are known, and for real."""

import json
import re
import tomllib
from collections.abc import Sequence

import pytest

from muntin import cli
from muntin.errors import UserError
from muntin.measure import choose as module
from muntin.measure.accuracy import MODELS_PEERS, Published, accuracy
from muntin.measure.choice import MEETS, OVER, STRADDLES, Candidate
from muntin.measure.choose import MARGIN, MachineClock, Search, candidates, choose, parse_latency
from muntin.measure.runners import Skipped
from muntin.progress import Bar


def made(name: str, top1: float, gmacs: float) -> Candidate:
    return Candidate(name, Published(str(top1), "made up"), gmacs, (8, 8))


class FakeClock:
    """Models that take the times they are said to take, in ms; `spread` widens each around its time."""

    def __init__(self, times: dict[str, float], spread: float = 0.01, broken: Sequence[str] = ()) -> None:
        self.times, self.spread, self.broken = times, spread, broken
        self.measured: list[str] = []
        self.forgotten: set[str] = set()

    def quick(self, candidate: Candidate) -> list[float]:
        self.measured.append(candidate.name)
        if candidate.name in self.broken:
            raise Skipped("it does not run here")
        return [self.times[candidate.name]] * 3

    def together(self, candidates: Sequence[Candidate]) -> list[list[float]]:
        assert not self.forgotten & {c.name for c in candidates}
        steps = [self.spread * (i - 4.5) / 4.5 for i in range(10)]
        return [[self.times[c.name] * (1 + step) for step in steps] for c in candidates]

    def forget(self, candidate: Candidate) -> None:
        self.forgotten.add(candidate.name)


def searched(budget: float, clock: FakeClock, models: list[Candidate], batch: int = 1) -> tuple[Search, list[str]]:
    search = Search(budget, batch, clock, Bar("test", 1, shown=False))
    found = search.run(sorted(models, key=lambda c: -c.top1))
    return search, [c.name for c in found if search.verdict(c.name) == MEETS]


# 1 GMAC takes 10 ms everywhere, so a model of g GMACs takes 10 g.
EVEN = [made("huge", 90, 20), made("large", 85, 8), made("middle", 80, 4), made("small", 75, 2), made("tiny", 70, 1)]
TIMES = {c.name: 10 * c.gmacs for c in EVEN}


@pytest.mark.parametrize(
    ("budget", "best"), [(300, "huge"), (100, "large"), (50, "middle"), (21, "small"), (11, "tiny")]
)
def test_the_most_accurate_within_the_budget_is_found(budget, best):
    assert searched(budget, FakeClock(TIMES), EVEN)[1][0] == best


def test_what_cannot_meet_the_budget_is_not_measured():
    clock = FakeClock(TIMES)
    search, _ = searched(25, clock, EVEN)
    assert "huge" not in clock.measured and "large" not in clock.measured
    assert search.skipped == {"huge": 20 * 10 / MARGIN, "large": 8 * 10 / MARGIN}


def test_a_model_skipped_by_a_low_rate_is_looked_at_again_when_a_higher_one_is_seen():
    models = [made("best", 90, 9), made("quick", 85, 3.9), made("usual", 80, 2), made("tiny", 70, 1)]
    clock = FakeClock({"best": 40, "quick": 17, "usual": 20, "tiny": 10})  # the first two at twice the rate
    search, meets = searched(41, clock, models)
    assert meets[0] == "best" and not search.skipped


def test_batches_count_in_what_is_predicted():
    search, _ = searched(25, FakeClock({c.name: 40 * c.gmacs for c in EVEN}), EVEN, batch=4)
    assert search.skipped["huge"] == pytest.approx(20 * 40 / MARGIN)


def test_an_interval_around_the_budget_straddles_it():
    search, meets = searched(40, FakeClock(TIMES, spread=0.05), EVEN)
    assert search.verdict("middle") == STRADDLES
    assert meets == ["small", "tiny"]


def test_where_none_meets_the_cheapest_was_measured():
    search, meets = searched(3, FakeClock(TIMES), EVEN)
    assert meets == [] and search.verdict("tiny") == OVER
    assert search.found(EVEN[-1]).quick


def test_the_search_goes_on_below_models_that_do_not_run():
    clock = FakeClock(TIMES, broken=("small", "tiny"))
    search, meets = searched(50, clock, EVEN)
    assert meets == ["middle"] and search.failed == {name: "it does not run here" for name in ("small", "tiny")}


def test_runners_up_are_measured_in_turns_with_the_answer():
    search, meets = searched(300, FakeClock(TIMES), EVEN)
    assert meets[:3] == ["huge", "large", "middle"] and set(meets[:3]) <= set(search.final)


@pytest.mark.parametrize(
    ("text", "ms"), [("20ms", 20.0), ("0.5s", 500.0), ("900us", 0.9), (" 7 ms ", 7.0), (".5ms", 0.5)]
)
def test_latencies(text, ms):
    assert parse_latency(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["20", "fast", "-3ms", "0ms", "20 min", "1e3ms", ""])
def test_latencies_that_cannot_be_read(text):
    with pytest.raises(UserError, match="20ms, 900us or 0.5s"):
        parse_latency(text)


def test_candidates_come_by_accuracy_and_without_figures_known_in_part():
    found, left_out = candidates()
    assert [c.top1 for c in found] == sorted((c.top1 for c in found), reverse=True)
    names = {c.name for c in found}
    assert {"swin_b", "swinv2_t", "efficientvit_m5", "rmt_l", "swin_free_b_br_dr12"} <= names
    assert {"swin_free_t (82.x)", "swin_l (86.3 (22k pre-training))", "rmt_deit_s"} <= set(left_out)
    assert not names & {line.split(" ")[0] for line in left_out}


def test_candidates_of_another_size_and_library_are_counted_there():
    (peer, ours), _ = candidates(["efficientvit_m0", "timm:mobilenetv3_large_100"], (192, 192))
    assert (peer.name, peer.top1, peer.size) == ("timm:mobilenetv3_large_100", 75.2, (192, 192))
    assert ours.gmacs < candidates(["efficientvit_m0"])[0][0].gmacs


@pytest.mark.parametrize(("arguments", "message"), [
    (["--latency", "20ms", "--among", "swim_t"], "did you mean 'swin_t'"),
    (["--latency", "20ms", "--among", "swin_free_t"], "no complete accuracy .* swin_free_t .82.x"),
    (["--latency", "20ms", "--engine", "openvin"], "did you mean 'openvino'"),
    (["--latency", "20ms", "--precision", "bf17"], "did you mean 'bf16'"),
    (["--latency", "20"], "with its unit: 20ms"),
    (["--latency", "20ms", "--throughput", "3"], "give one budget"),
    ([], "give one budget"),
    (["--throughput", "-1"], "above 0"),
    (["--latency", "20ms", "--batch", "0"], "at least 1"),
])  # fmt: skip
def test_bad_input(arguments, message, capsys):
    assert cli.main(["choose", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_engine_whose_package_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("muntin.measure.runners.importlib.util.find_spec", lambda name: None)
    assert cli.main(["choose", "--latency", "20ms", "--engine", "openvino"]) == 2
    assert 'pip install "muntin[export]"' in capsys.readouterr().err


def test_choosing_on_this_machine(tmp_path, capsys):
    out = tmp_path / "choice.json"
    some = ["efficientvit_m0", "efficientvit_m1"]
    command = ["choose", "--among", *some, "--size", "64", "--seconds", "0.2", "--json", str(out)]
    assert cli.main([*command, "--latency", "100s"]) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["chosen"] == "efficientvit_m1" and [row["model"] for row in found["found"]] == some[::-1]
    assert all(row["verdict"] == MEETS and not row["quick"] for row in found["found"])
    assert {"machine", "versions", "commit", "protocol"} <= found.keys()
    assert "> efficientvit_m1" in shown and "published for each model's own size" in shown
    assert cli.main([*command, "--latency", "1us"]) == 2
    captured = capsys.readouterr()
    assert "no model meets 0.001 ms" in captured.err and "--precision bf16" in captured.err
    assert json.loads(out.read_text())["chosen"] is None


def test_a_model_that_the_engine_does_not_take_is_told_apart(monkeypatch):
    def refused(self, candidate):
        raise Skipped("no")

    monkeypatch.setattr(MachineClock, "quick", refused)
    choice = choose("20ms", among=["efficientvit_m0"], progress=False)
    assert choice.failed == {"efficientvit_m0": "no"} and choice.chosen is None
    assert "none could be measured" in choice.refusal()


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="device 'tpu'"):
        module.choose("20ms", device="tpu", progress=False)


def test_figures_of_peers_are_those_of_the_installed_weights():
    models = pytest.importorskip("torchvision.models")
    for name, row in tomllib.loads(MODELS_PEERS.read_text()).items():
        assert row["source"] and accuracy(name).top1 is not None
        if row["source"].startswith("torchvision"):
            kind, entry = row["source"].split()[1].split(".")
            figure = models.get_weight(f"{kind}.{entry}").meta["_metrics"]["ImageNet-1K"]["acc@1"]
            assert float(row["top1"]) == figure, name


def test_accuracy_of_the_same_architecture_elsewhere():
    assert accuracy("timm:swin_tiny_patch4_window7_224").text == accuracy("swin_t").text == "81.2"
    assert accuracy("timm:efficientvit_m5").top1 == 77.1
    assert accuracy("swin_free_t").top1 is None and accuracy("swin_free_t").text == "82.x"
    assert accuracy("torchvision:swin_t").top1 == 81.474
    assert accuracy("runs/digits") is accuracy("timm:no_such") is None
