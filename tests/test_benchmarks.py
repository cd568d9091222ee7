"""The benchmarks run, count and compare rightly. No speed is asserted: that is what they are there to report."""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import cases, checks, flops, linear, memory, models, packed, readme, run as runner, summary
from benchmarks.__main__ import app
from benchmarks.cases import CASES, Case
from benchmarks.peers import PEERS, TITLES, swin
from benchmarks.peers.inputs import tensors
from benchmarks.sampling import Pace, interleave, spread_out
from benchmarks.subject import NotHere, Subject

from nbhd.backends import cpu
from tests.commands import run
from tests.truth import keys_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*args: object):
    """``python -m benchmarks ARGS`` in this process."""
    return run(app, *args)


# ---- the registry


def test_names_are_unique_and_everything_named_exists():
    assert len(cases._cases()) == len(CASES)
    assert not set(CASES) & set(models.CASES)
    assert set(PEERS) == set(TITLES)
    for case in CASES.values():
        assert set(case.peers) <= set(PEERS) - {"nbhd"}, case.name
    for case in models.CASES.values():
        assert set(case.networks) <= set(models.TITLES)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cases_and_their_small_forms_fit(case):
    for which in (case, case.small()):
        for length, k, d in zip(which.spatial, which.kernel_size, which.dilation, strict=True):
            assert k * d <= length


# ---- arithmetic


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_flop_of_full_windows_is_four_and_ten_times_keys_and_dim(case):
    if any(case.is_causal):
        pytest.skip("a causal window has fewer keys at the start; counted one by one below")
    per_query = math.prod(case.kernel_size) * case.head_dim
    assert flops.forward_flop(case) == 4 * per_query * case.queries
    assert flops.backward_flop(case) == 10 * per_query * case.queries


@pytest.mark.parametrize(
    "case",
    [
        Case("a", (9, 7), heads=3, head_dim=4, kernel_size=(4, 3), batch=2, stride=(2, 1), is_causal=(True, False)),
        Case("b", (13,), heads=1, head_dim=5, kernel_size=(3,), dilation=(4,), is_causal=(True,)),
        Case("c", (5, 6, 7), heads=2, head_dim=2, kernel_size=(2, 3, 7), stride=(2, 3, 1), is_causal=(0, 1, 1)),
        Case("d", (8, 9), heads=1, head_dim=1, kernel_size=(3, 2), dilation=(2, 4)),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_pairs_are_those_counted_one_by_one(case):
    counted = 0
    axes = (case.spatial, case.kernel_size, case.stride, case.dilation, case.is_causal)
    for position in itertools.product(*map(range, case.spatial)):
        slots = [keys_of(i, *axis) for i, axis in zip(position, zip(*axes, strict=True), strict=True)]
        counted += math.prod(len([key for key in axis if key is not None]) for axis in slots)
    assert flops.pairs(case) == counted
    assert flops.forward_flop(case) == 4 * counted * case.head_dim * case.heads * case.batch


def test_the_useful_flop_of_a_network_is_that_of_its_layers():
    """For NAT-Tiny at 224 the authors give 4.3 G multiply-adds."""
    counted = models.useful_flop(replace(models.CASES["models/tiny-224-b8"], batch=1))
    assert counted["inference"] / 2 == pytest.approx(4.3e9, rel=0.02)


# ---- the peers


def _comparable() -> list[tuple[str, Case]]:
    kinds = {
        name: CASES[name].small()
        for name in (
            "nat/56x56-b8",
            "nat/7x7-b8",
            "1d/window5-30000-dilation32",
            "1d/window128-8192-causal",
            "3d/3x7x7",
            "window/7x7-d32-stride2",
            "window/8x8-d32",
            "overhead/3x3",
        )
    }
    peers = ("dense-sdpa", "unfold", "nbhd-reference")
    return [(peer, case) for peer in peers for case in kinds.values()]


@pytest.mark.parametrize(("peer", "case"), _comparable(), ids=lambda value: getattr(value, "name", value))
def test_peers_that_compute_the_same_give_the_same(peer, case):
    expected = PEERS["nbhd"](case).output()
    try:
        subject = PEERS[peer](case)
    except NotHere as reason:
        assert peer == "unfold" and any(case.is_causal), reason
        return
    assert checks.check_peer(subject, expected) is not None
    d_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = PEERS["nbhd"](case).gradients(d_out), subject.gradients(d_out)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a C++ compiler at work
def test_flexattention_computes_the_same_where_it_compiles():
    case = replace(CASES["nat/28x28-b8"], spatial=(9, 8), batch=1, heads=2)
    try:
        subject = PEERS["flex-compiled"](case)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert checks.check_peer(subject, PEERS["nbhd"](case).output()) < 1e-3
    assert "training" not in subject.runs


def test_natten_is_skipped_with_a_reason_or_computes_the_same():
    case = CASES["window/7x7-d32-stride2"].small()
    try:
        subject = PEERS["natten"](case)
    except NotHere as reason:
        assert "NATTEN" in str(reason)
        return
    checks.check_peer(subject, PEERS["nbhd"](case).output())


@pytest.mark.parametrize("spatial", [(6, 6), (6, 9), (7, 8), (3, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", ["swin-shifted-sdpa", "swin-shifted-eager", "swin-unshifted-sdpa"])
def test_swins_windows_are_the_definition(name, spatial, has_bias):
    """Against dense attention in which two positions see each other if they share a window and were neighbours."""
    window = 3
    case = Case("swin", spatial, heads=2, head_dim=4, kernel_size=(window, window), batch=2, has_bias=has_bias)
    subject = PEERS[name](case)
    out = subject.once("forward")[0]
    shift = window // 2 if "unshifted" not in name and min(spatial) > window else 0
    inputs = tensors(case)
    padded = [-(-length // window) * window for length in spatial]
    place, region = [], []
    for length in padded:
        i = (torch.arange(length) - shift) % length  # where the roll puts it
        place.append(i)
        region.append(i // window * 10 + ((i >= length - shift).long() if shift else 0))
    x, y = torch.meshgrid(place[0], place[1], indexing="ij")
    rx, ry = torch.meshgrid(region[0], region[1], indexing="ij")
    groups = (rx * 1000 + ry).flatten()
    q, k, v = (
        torch.nn.functional.pad(t.detach(), (0, 0, 0, 0, 0, padded[1] - spatial[1], 0, padded[0] - spatial[0]))
        .flatten(1, 2)
        .transpose(1, 2)
        for t in inputs[:3]
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(case.head_dim)
    if has_bias:
        dx, dy = (c.flatten()[:, None] - c.flatten()[None] for c in (x, y))
        near = (dx.abs() < window) & (dy.abs() < window)
        index = ((dx + window - 1) * (2 * window - 1) + dy + window - 1).where(near, torch.zeros(()).long())
        scores = scores + inputs.bias.detach().flatten(1)[:, index]
    scores = scores.masked_fill(groups[:, None] != groups[None], -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).unflatten(1, padded)[:, : spatial[0], : spatial[1]]
    torch.testing.assert_close(out.unflatten(-1, (2, 4)), expected, rtol=1e-4, atol=1e-4)
    gradients = subject.once("training")[1:]
    assert len(gradients) == 3 + has_bias and all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


def test_swin_needs_squares():
    with pytest.raises(NotHere, match="two axes"):
        swin.prepare_shifted_sdpa(CASES["3d/5x5x5"].small())
    with pytest.raises(NotHere, match="dilated"):
        swin.prepare_shifted_sdpa(CASES["dilation/2"].small())


def test_a_wrong_peer_is_not_timed(monkeypatch):
    right = PEERS["dense-sdpa"]

    def wrong(case):
        subject = right(case)
        return replace(subject, output=lambda: subject.output() + 1)

    monkeypatch.setitem(PEERS, "dense-sdpa", wrong)
    request = runner.Request(["overhead/3x3"], (1,), 0.0, is_quick=True, measures_memory=False)
    found = runner.run(request, lambda line: None)
    result = found["results"][0]
    assert "differs by" in result["skipped"]["dense-sdpa"]
    assert "dense-sdpa" not in result["samples"]["1"]["subjects"]


# ---- sampling and what is made of it


def _fake(name: str, seconds: float, only_at: int | None = None) -> Subject:
    return Subject(name, {"forward": lambda repeats: {"forward": seconds}}, units=1, only_at=only_at)


def test_every_round_has_the_first_subject_and_its_own_product():
    pace = Pace(seconds=0.05, sample_s=0.0, least_rounds=3, most_rounds=8, mm_size=16)
    found = interleave([_fake("a", 1.0), _fake("b", 2.0, only_at=1)], (1,), pace, "a")["1"]
    rounds = len(found["mm_flop_per_s"])
    assert 3 <= rounds <= 8
    assert found["subjects"]["a"]["forward"] == [1.0] * rounds
    assert 3 <= sum(s is not None for s in found["subjects"]["b"]["forward"]) <= rounds
    two = interleave([_fake("a", 1.0), _fake("b", 2.0, only_at=1)], (2,), pace, "a")["2"]
    assert set(two["subjects"]) == {"a"}


def test_what_takes_long_is_timed_once():
    def slow(repeats: int) -> dict[str, float]:
        time.sleep(0.05)
        return {"forward": 0.05 * repeats}

    pace = Pace(seconds=0.0, sample_s=0.0, least_rounds=3, most_rounds=8, slow_s=0.02, mm_size=16)
    found = interleave([_fake("a", 1.0), Subject("b", {"forward": slow}, units=1)], (1,), pace, "a")["1"]
    assert found["subjects"]["a"]["forward"] == [1.0] * 3
    assert sum(s is not None for s in found["subjects"]["b"]["forward"]) == 1


def test_rarer_runs_are_spread_and_paired():
    for rounds in range(1, 40):
        order = spread_out(rounds)
        assert sorted(order) == list(range(rounds))
    assert spread_out(8) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_shares_and_ratios_are_of_pairs():
    result = {
        "name": "x", "first": "a", "units": {"a": 10, "b": 5}, "useful_flop": {"forward": 100.0, "backward": 300.0},
        "samples": {
            "1": {"mm_flop_per_s": [100.0, 200.0, 400.0], "subjects": {"a": {"forward": [4.0, 4.0, 4.0]}}},
            "2": {
                "mm_flop_per_s": [100.0, 200.0, 400.0],
                "subjects": {
                    "a": {"forward": [2.0, 1.0, 0.5], "recording": [1.0] * 3, "backward": [2.0] * 3},
                    "b": {"forward": [3.0, None, 0.75]},
                },
            },
        },
    }  # fmt: skip
    one, ours, other = summary.rows(result)
    assert one.threads == 1 and not one.ratios
    assert ours.shares["forward"].median == pytest.approx(100 / 2 / 100)  # 0.5 in every round
    assert ours.shares["forward"].low == pytest.approx(ours.shares["forward"].high)
    assert ours.times["both"].median == 3.0
    assert ours.first_at_one["forward"].median == pytest.approx(4.0)  # 4/2, 4/1, 4/0.5
    # half the units: twice the time for as much work
    assert other.ratios["forward"].median == pytest.approx(3.0)
    assert "both" not in other.ratios


# ---- memory


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
@pytest.mark.slow
def test_peak_memory_sees_what_is_gathered():
    case = replace(CASES["nat/28x28-b8"], batch=2)
    gathered = case.queries * case.neighborhood.slots * case.head_dim * 4
    seen = memory.measure(case, "unfold", "forward", 1)
    assert gathered <= seen < 3 * gathered
    assert memory.measure(case, "nbhd", "training", 1) < gathered
    with pytest.raises(RuntimeError, match="two axes"):
        memory.measure(CASES["3d/5x5x5"].small(), "swin-shifted-sdpa", "forward", 1)


# ---- the command


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    result = bench("--quick", "--threads", "1", "--no-memory", "--output", path)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_goes_through_every_default_case(quick_run):
    run = json.loads(quick_run.read_text(encoding="utf-8"))
    default = [name for name, case in runner.registry().items() if case.is_default]
    assert [result["name"] for result in run["results"]] == default
    assert not run["failures"] and run["is_quick"]
    for result in run["results"]:
        assert result["skipped"].keys() <= {"natten", "flex-compiled"}, result["name"]
        for here in result["samples"].values():
            for samples in here["subjects"].values():
                assert all(s is None or s > 0 for row in samples.values() for s in row)
    text = json.dumps(run)
    assert str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.slow
def test_a_run_is_shown_again_and_compared(quick_run):
    shown = bench("--show", quick_run, "--against", quick_run)
    assert shown.exit_code == 0
    assert "share before" in shown.stdout and "nat/56x56-b8" in shown.stdout and "Swin-T" in shown.stdout


@pytest.mark.slow
def test_the_readme_table_comes_from_the_json(quick_run, tmp_path):
    target = tmp_path / "README.md"
    target.write_text(f"before\n{readme.BEGIN}\nstale text\n{readme.END}\nafter\n", encoding="utf-8")
    refused = bench("--table", quick_run, "--readme", target)
    assert refused.exit_code == 2 and "quick" in refused.stderr
    run = json.loads(quick_run.read_text(encoding="utf-8")) | {"is_quick": False}
    # numbers that can be recognised
    for result in run["results"]:
        if result["name"] == "nat/14x14-b8":
            result["samples"]["1"]["subjects"]["nbhd"]["forward"] = [0.123, 0.123]
    source = tmp_path / "run.json"
    source.write_text(json.dumps(run), encoding="utf-8")
    for _ in range(2):  # the second time changes nothing
        assert bench("--table", source, "--readme", target).exit_code == 0
        text = target.read_text(encoding="utf-8")
        assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
        assert "**123 / " in text and "Swin-T" in text and "[run.json](run.json)" in text
    target.write_text("no comments\n", encoding="utf-8")
    assert bench("--table", source, "--readme", target).exit_code == 1
    assert target.read_text(encoding="utf-8") == "no comments\n"


def test_the_tables_in_the_readme_are_those_of_the_committed_json():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(readme.BEGIN) == 1 and text.count(readme.END) == 1
    inside = text.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    named = re.search(r"\]\((benchmarks/results/[^)]+\.json)\)", inside)
    if named is None:
        assert "|" not in inside, "a table that no JSON stands behind"
        return
    run = json.loads((ROOT / named[1]).read_text(encoding="utf-8"))
    assert inside == readme.tables(run, Path(named[1]))


def test_the_other_processors_in_the_readme_are_those_of_the_committed_json():
    """Rates and ratios of networks: medians, ratios those of the same round."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 3}
    networks, epyc, xeon = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in re.findall(r"\(benchmarks/results/([^)]*2026-11-30[^)]*)\.json\)", text)
    )

    def cell(measured, case, base, peers, what):
        result = next(result for result in measured["results"] if result["name"] == f"models/tiny-224-{case}")
        samples = {name: found[what] for name, found in result["samples"]["2"]["subjects"].items() if what in found}
        rate = result["units"][base] / statistics.median(filter(None, samples[base]))
        rounds = [zip(samples[base], samples[peer], strict=True) for peer in peers]
        ratios = [statistics.median(theirs / ours for ours, theirs in pairs if ours and theirs) for pairs in rounds]
        return f"{rate:.1f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}"

    both, checked = ("swin-tiny", "convnext-tiny"), 0
    alone = {cells[0]: cells[1] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 2}
    (name_of_avx2,) = re.findall(r"\(benchmarks/results/([^)]*avx2[^)]*)\.json\)", text)
    avx2 = json.loads((ROOT / "benchmarks" / "results" / f"{name_of_avx2}.json").read_text(encoding="utf-8"))
    for name, case, base, what in (
        ("NAT-Tiny, inference", "b8", "nat-tiny", "inference"),
        ("made ready by `nbhd.optimize_for_inference`", "b8", "nat-tiny-optimized", "inference"),
        ("a training step", "b8", "nat-tiny", "training_step"),
        ("one image at a time, inference", "b1", "nat-tiny", "inference"),
        ("the same, made ready", "b1", "nat-tiny-optimized", "inference"),
        ("the same, a training step", "b1", "nat-tiny", "training_step"),
    ):
        for written, measured in zip(rows[name], (networks, xeon), strict=True):
            assert written == cell(measured, case, base, both, what) + ")", name
            checked += 1
        assert alone[name] == cell(avx2, case, base, both, what) + ")", name
    of_swin = ("swin-tiny-bfloat16",)
    for written, measured in zip(rows["bfloat16, inference"], (epyc, xeon), strict=True):
        assert written.startswith(cell(measured, "b8-bfloat16", "nat-tiny-bfloat16", of_swin, "inference") + " times")
        checked += 1
    both_cast = ("swin-tiny-autocast", "convnext-tiny-autocast")
    trained = cell(epyc, "b8-autocast", "nat-tiny-autocast", both_cast, "training_step") + ")"
    assert rows["autocast to bfloat16, a training step"][0] == trained
    for row, variant, runs in (
        ("its peak memory; Swin-T's, ConvNeXt-T's", "", (epyc, xeon)),
        ("peak memory of that; Swin-T's, ConvNeXt-T's", "-autocast", (epyc,)),
    ):
        for written, measured in zip(rows[row], runs, strict=False):
            case = next(result for result in measured["results"] if result["name"] == f"models/tiny-224-b8{variant}")
            peaks = [case["peak_bytes"][name + variant]["training_step"] for name in ("nat-tiny", *both)]
            ours, *theirs = (round(peak / 2**20) for peak in peaks)
            assert written == f"{ours} MiB; {', '.join(map(str, theirs))}"
            checked += 1
    forward = "NAT's attention against Swin's shifted (SDPA), forward; at 7x7, where Swin does not shift"
    for row, quantity in ((forward, "forward"), ("with the gradients", "both")):
        for written, measured in zip((*rows[row], alone[row]), (epyc, xeon, avx2), strict=True):
            *shifted, whole = (
                next(r.ratios[quantity].median for r in summary.rows(result)
                     if r.threads == 2 and r.subject == "swin-shifted-sdpa")
                for result in measured["results"] if re.fullmatch(r"nat/\d+x\d+-b8", result["name"])
            )  # fmt: skip
            assert written == f"{min(shifted):.1f} to {max(shifted):.1f}; {whole:.1f}"
            checked += 1
    assert checked == 23


def test_the_list_has_every_case_and_its_peers():
    result = bench("--list", "--full")
    assert result.exit_code == 0
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == list(runner.registry())
    only = bench("--list", "--case", "3d/*", "--case", "overhead/3x3").stdout.splitlines()
    assert len(only) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "nothing/*"], "matches nothing"),
        (["--peer", "nobody", "--case", "overhead/3x3"], "matches nothing"),
        (["--threads", "0"], "whole numbers"),
        (["--threads", "two"], "whole numbers"),
        (["--threads", "9999"], "cores"),
        (["--minutes", "0"], "minutes"),
        (["--nothing"], "--nothing"),
    ],
)
def test_wrong_calls_end_with_2_and_a_reason(args, message):
    result = bench(*args)
    assert result.exit_code == 2
    assert message in result.stderr and not result.stdout


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"format": 0, "results": []}'])
@pytest.mark.parametrize("option", ["--show", "--table", "--against"])
def test_files_that_are_no_runs_end_with_1(option, content, tmp_path):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    extra = ["--case", "overhead/3x3", "--quick"] if option == "--against" else []
    result = bench(option, path, *extra)
    assert result.exit_code == 1 and "run.json" in result.stderr


def test_an_output_that_cannot_be_written_is_said_before_the_run(tmp_path):
    result = bench("--quick", "--case", "overhead/3x3", "--output", tmp_path / "missing" / "run.json")
    assert result.exit_code == 1 and "does not exist" in result.stderr and "[1/1]" not in result.stderr


def test_a_case_that_fails_is_named_and_the_others_run(monkeypatch, tmp_path):
    right = checks.check_ours

    def wrong(case):
        if case.name == "overhead/7x7":
            raise checks.Wrong("nbhd is wrong on a small map of this case: error 1")
        return right(case)

    monkeypatch.setattr(checks, "check_ours", wrong)
    output = tmp_path / "run.json"
    result = bench("--quick", "--threads", "1", "--case", "overhead/*", "--output", output)
    assert result.exit_code == 1
    assert "overhead/7x7" in result.stderr
    run = json.loads(output.read_text(encoding="utf-8"))
    assert [r["name"] for r in run["results"]] == ["overhead/3x3", "overhead/14x14"]
    assert list(run["failures"]) == ["overhead/7x7"]


def test_peers_are_chosen_by_name():
    result = bench("--quick", "--threads", "1", "--no-memory", "--case", "window/3x3-d32", "--peer", "swin-unshifted-*")
    assert result.exit_code == 0
    assert "unshifted, SDPA" in result.stdout and "shifted window attention, eager" not in result.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_linear_layers(threads: int) -> None:
    done = run(linear.app, "--batch", 1, "--rounds", 3, "--threads", threads)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if "->" in line]
    assert len(rows) == 12 and all(re.search(r"\d\.\d\d \(\d+\.\d\d-\d+\.\d\d\) +\d+\.\d\d \(", row) for row in rows)


@pytest.mark.parametrize(("how", "threads"), [("packed", 1), ("packed", 2), ("joined", 2), ("gradients", 2)])
def test_layers_in_one_call(how: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(packed.app, "--how", how, "--batch", 1, "--rounds", 3, "--threads", threads)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if re.search(r"\d\.\d\d \(\d+\.\d\d-\d+\.\d\d\)$", line)]
    assert len(rows) == 12 and "all of the network's" in done.output
    monkeypatch.setattr(cpu, "why_unusable", lambda: "no library today.")
    done = run(packed.app, "--batch", 1)
    assert done.exit_code == 2 and "nbhd: there is nothing to time: no library today." in done.output


@pytest.mark.parametrize("how", [packed.How.PACKED, packed.How.JOINED])
def test_both_ways_around_an_attention_compute_the_same(how: packed.How) -> None:
    for _, _, plain, whole in packed.ways(98, 64, how):
        outputs = [x if isinstance(x, torch.Tensor) else torch.cat(list(x), -1) for x in (plain(), whole())]  # type: ignore[call-overload]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_what_is_timed() -> None:
    leaf = torch.randn(5, 3, requires_grad=True)
    seen = []
    leaf.register_hook(seen.append)
    packed.with_gradients(lambda: [leaf * 2, leaf * 3], [leaf])()
    assert leaf.grad is None and len(seen) == 1 and seen[0].unique().numel() == seen[0].numel()


def test_the_timing_of_the_cores_kernels_compiles() -> None:
    compiler = shutil.which("c++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("it needs a C++ compiler and x86-64")
    flags = ("-std=c++20", "-fsyntax-only", "-mavx2", "-mfma", "-mf16c", "-mbmi2")
    subprocess.run([compiler, *flags, str(ROOT / "benchmarks/core/tiles.cpp")], check=True)
