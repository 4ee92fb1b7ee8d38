"""The page: complete by itself, true to its report, and no place for foreign markup."""

import base64
import dataclasses
import hashlib
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from dynmask.evals.overall import EVERYTHING, baseline_of, overall
from dynmask.evals.page import page, reports_of, write_page
from dynmask.evals.page.charts import pareto, shape
from dynmask.evals.page.colours import LEVELS, MARKS, THEMES, contrast, ink_on, ramp, rgb
from dynmask.evals.page.markup import VOID, Html, plain, tag
from dynmask.evals.page.pixels import image, levels, png
from dynmask.evals.page.style import SCRIPT, sheet
from dynmask.evals.page.tables import density_level, mass_level, share_level
from dynmask.evals.points import Point, frontier, points
from dynmask.evals.reading import ABOVE, PIXELS, SCALE, _ranges, reading
from dynmask.evals.report import Bucket, ItemResult, Report, Row, paired_difference
from dynmask.masks import LifetimeMask
from dynmask.nn import PairScore
from dynmask.policies import H2O, Causal, Gated, Quest, Retained, Streaming, VerticalSlash
from tests.stand_in import stand_in_model, stand_in_tokenizer

PROMPT = "The locker number of Anna is 7364. " + "Nothing else is known about lockers. " * 12
POLICIES = {"full": None, "streaming": Streaming(sinks=2, window=20), "all": Causal()}
HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>\"' &amp; <b>"


@pytest.fixture(scope="module")
def read():
    return reading(
        stand_in_model(), stand_in_tokenizer(), POLICIES, PROMPT, source="a test",
        answers=("nowhere", "7364"), measure_rows=8,
    )  # fmt: skip


def item(policy, group, index, score, text="7364"):
    return ItemResult(policy, group, index, score, text, ("7364",), {"depth": index / 3}, 100, 4)


def row(policy, group, scores, density, **more):
    heads = [[density, min(1.0, 2 * density)]] * 3
    return Row(
        policy, group, len(scores), policy != "gated", sum(scores), sum(scores) / len(scores),
        (0.1, 0.9), density=density, density_decode=density, kept_mass=0.9, kept_mass_p5=0.5,
        density_per_head=heads, kept_mass_per_head=heads, prefill_seconds=0.25, ms_per_token=3.5,
        peak_memory_bytes=2**24, cache_bytes=2**20, **more,
    )  # fmt: skip


HEADER = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc123",
    "command": "dynmask evaluate --task needle",
    "dtype": "float32",
    "versions": {"python": "3.11", "torch": "2.13.0", "dynmask": "0.1.0", "triton": None},
    "device": {"type": "cpu", "name": "a processor", "threads": 2},
    "model": {"name": "stand-in", "architecture": "Llama", "parameters": 9, "fingerprint": "f00"},
    "settings": {"seed": 0, "n": 4, "policies": {"full": "own attention", "gated": "Gated:1"}},
}


@pytest.fixture(scope="module")
def report(read):
    groups = {"1024 tokens": ([1, 1, 1, 1], [1, 0, 0.5, 1]), "2048 tokens": ([1, 0, 1], [0, 0, 1])}
    rows, items = [], []
    for group, both in groups.items():
        for policy, scores, density in zip(("full", "gated"), both, (1.0, 0.125), strict=True):
            more = {}
            if policy == "gated":
                difference, interval, method = paired_difference(scores, both[0])
                more = {"difference": difference, "difference_interval": interval,
                        "difference_method": method, "kl": 0.25, "agreement": 0.75}  # fmt: skip
            rows.append(row(policy, group, scores, density, **more))
            items += [item(policy, group, i, float(score)) for i, score in enumerate(scores)]
    return Report("needle", HEADER, tuple(rows), tuple(items), True, (), read)


class Parsed(HTMLParser):
    """The elements of a page, in order, with a check that each is closed where it belongs."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name):
        return [attributes for found, attributes in self.elements if found == name]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def parsed(report):
    return Parsed(page([report]))


# --- the file ----------------------------------------------------------------------------------


def test_the_page_is_complete_by_itself(report, parsed):
    text = page([report])
    for _, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|@import|url\(", text)
    names = [name for name, _ in parsed.elements]
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(names)


def test_only_the_script_of_the_page_may_run(parsed):
    (rules,) = [m["content"] for m in parsed.all("meta") if "Security" in m.get("http-equiv", "")]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in rules and rules.startswith("default-src 'none'")
    assert len(parsed.all("script")) == 1 and SCRIPT in page_text(parsed)
    for words in (SCRIPT, sheet()):
        assert "</" not in words  # nothing that would end the element it stands in


def page_text(parsed):
    return "".join(parsed.words)


def strings(data, change):
    """The same data with every string changed that may come from outside."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, list):
        return [strings(value, change) for value in data]
    if isinstance(data, dict):
        keep = ("pixels", "strip", "type", "group")
        return {k: v if k in keep else strings(v, change) for k, v in data.items()}
    return data


def test_text_from_outside_is_never_markup(report):
    """Every string is made hostile; the elements and their attributes stay those of before."""
    data = report.to_dict()
    harmless = re.sub("[<>&\"']", "x", HOSTILE)  # as long, and broken into lines as often
    plainly, nasty = (
        Report.from_dict(strings(data, lambda text, m=mark: text + m))
        for mark in (harmless, HOSTILE)
    )
    a, b = (Parsed(page([r])) for r in (plainly, nasty))
    shapes = [[(name, sorted(found)) for name, found in x.elements] for x in (a, b)]
    assert shapes[0] == shapes[1]
    assert "alert(1)</script>" in page_text(b)  # it is there to be read
    rows = tuple(dataclasses.replace(r, group=HOSTILE, metrics={HOSTILE: 1.0}) for r in report.rows)
    groups = dataclasses.replace(report, rows=rows[:2], items=(), reading=None)
    assert len(Parsed(page([groups])).all("script")) == 1


@given(st.text(), st.text())
def test_tags_hold_any_text(text, value):
    found = Parsed(tag("p", text, title=value))
    assert [name for name, _ in found.elements] == ["p"]
    assert "".join(found.words) == plain(text)
    assert found.all("p")[0]["title"] == plain(value)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", plain(text))


def test_names_of_elements_are_no_place_for_text():
    with pytest.raises(ValueError, match="name of letters"):
        tag("p onclick=x")
    with pytest.raises(ValueError, match="name of letters"):
        tag("p", **{"a b": "c"})
    assert tag("p", Html("<b>x</b>"), title=Html("<b>")) == '<p title="&lt;b&gt;"><b>x</b></p>'
    assert plain("a\ud800\x00\u202eb\r\nc") == "a?\u2400[U+202E]b\nc"


# --- for everybody -----------------------------------------------------------------------------


def test_pictures_and_tables_can_be_heard(parsed):
    assert all(found["alt"] for found in parsed.all("img"))
    assert all(found.get("scope") in ("col", "row") for found in parsed.all("th"))
    for found in parsed.all("svg"):
        hidden = found.get("aria-hidden") == "true"
        assert hidden or (found["role"] == "img" and found["aria-label"])
    levels_of = [int(name[1]) for name, _ in parsed.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels_of[0] == 1 and levels_of.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels_of))
    names = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(names) == len(set(names))
    assert parsed.all("html")[0]["lang"] == "en"
    assert all(found.get("tabindex") == "0" and found["aria-label"]
               for found in parsed.all("div") if found.get("class") == "scroll")  # fmt: skip


@pytest.mark.parametrize("theme", THEMES)
def test_everything_can_be_told_from_its_ground(theme):
    colours = {name: rgb(value) for name, value in THEMES[theme].items()}
    for ground in ("page", "card"):
        for name in ("ink", "soft", "accent", "good", "bad"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for index in range(MARKS):
        assert contrast(colours[f"p{index}"], colours["card"]) >= 3
    for level in range(LEVELS):
        ground = ramp(theme, level)
        assert contrast(ink_on(ground), ground) >= 4.5
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


def test_marks_differ_in_shape_not_only_in_colour():
    shapes = {str(shape(index, 0, 0)) for index in [None, *range(MARKS)]}
    assert len(shapes) == MARKS + 1


@pytest.mark.parametrize("level", [density_level, mass_level, share_level])
def test_steps_of_heat_maps_rise(level):
    steps = [level(v / 1000) for v in range(1001)]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == LEVELS - 1
    assert level(-1.0) == 0 and level(2.0) == LEVELS - 1


# --- what it says ------------------------------------------------------------------------------


def test_the_headline_says_what_the_rows_say(report, parsed):
    text = parsed.text
    for words in ("12.5 %", "90.0 %", "16.0 MiB", "0.25 s", "3.5 ms",
                  "dynmask evaluate --task needle", "abc123", "a processor, 2 threads",
                  "torch 2.13.0", "Full attention answers 6 of 7", "0.25"):  # fmt: skip
        assert words in text, words
    rights = text.count("✓ right"), text.count("✗ wrong"), text.count("50 % in part")
    scores = [i.score for i in report.items]
    assert rights == (scores.count(1.0), scores.count(0.0), scores.count(0.5))


def test_overall_is_all_items_together(report):
    full, gated = overall(report)
    assert (full.group, full.n, full.right, gated.right) == (EVERYTHING, 7, 6, 3.5)
    assert full.difference is None
    pairs = {
        policy: [i.score for i in report.items if i.policy == policy]
        for policy in ("full", "gated")
    }
    expected = paired_difference(pairs["gated"], pairs["full"])
    assert (gated.difference, gated.difference_interval) == expected[:2]
    assert gated.density == 0.125 and gated.peak_memory_bytes == 2**24
    one = dataclasses.replace(report, rows=report.rows[:2], items=report.items[:8])
    assert overall(one) == list(one.rows)
    assert baseline_of(report) == "full"


def test_a_report_is_read_as_it_was_written(report, tmp_path):
    again = Report.load(report.save(tmp_path))
    assert again.to_dict() == report.to_dict() and page([again]) == page([report])
    assert again.rows == report.rows and again.items == report.items
    ppl = dataclasses.replace(report, task="perplexity", items=(), reading=None, rows=tuple(
        Row(name, "300 tokens", 2, True, density=0.5, perplexity=2.0,
            buckets=(Bucket(0, 256, 9, 1.0), Bucket(256, 300, 9, 2.0)))
        for name in ("full", "streaming")))  # fmt: skip
    assert Report.from_dict(ppl.to_dict()).rows == ppl.rows
    words = Parsed(page([ppl])).text
    assert "256–300" in words and "Perplexity by position" in words


@pytest.mark.parametrize(
    "data",
    [{}, {"schema": 2, "rows": []}, [], {"schema": 1, "rows": [{}]},
     {"schema": 1, "task": "x", "rows": [], "device": {}}],
)  # fmt: skip
def test_what_is_no_report_is_refused(data, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="dynmask evaluate --out"):
        Report.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected a report in JSON"):
        Report.load(path)


def test_one_page_has_all_reports_of_a_folder(report, tmp_path):
    report.save(tmp_path)
    (tmp_path / "aaa.json").write_text('{"no": "report"}')
    other = dataclasses.replace(report, task="lines", reading=None)
    several = reports_of(tmp_path, other)
    assert [r.task for r in several] == ["lines", "needle"]
    path = write_page(several, tmp_path / "report.html")
    found = Parsed(path.read_text(encoding="utf-8"))
    targets = {link["href"] for link in found.all("a")}
    assert targets == {"#r0", "#r1"} <= {"#" + f["id"] for f in found.all("h2") if "id" in f}
    again = dataclasses.replace(report, complete=False)
    assert [r.complete for r in reports_of(tmp_path, again)] == [False]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "aaa.json", "needle.json", "needle.txt", "report.html"]  # fmt: skip


def test_what_was_not_measured_is_left_out(report):
    bare = Row("streaming", "a", 2, True, 1.0, 0.5, (0.1, 0.9))
    lone = dataclasses.replace(report, rows=(bare,), items=(), reading=None)
    text = Parsed(page([lone])).text
    assert "50 %" in text and "attention kept" not in text.split("Density:")[0]
    assert "Head by head" not in text and "Answers" not in text
    with pytest.raises(ValueError, match="run an evaluation"):
        page([dataclasses.replace(lone, rows=())])


def test_many_heads_keep_their_numbers(report):
    wide = [[0.25] * 40, None, [0.5] * 40]
    rows = (dataclasses.replace(report.rows[1], density_per_head=wide, kept_mass_per_head=None),)
    found = Parsed(page([dataclasses.replace(report, rows=rows, items=(), reading=None)]))
    said = [words for words in found.words if words == "25"]
    assert len(said) == 40 and found.words.count("not measured") == 40


# --- curves ------------------------------------------------------------------------------------

NUMBERS = st.floats(0.001, 1.0)


PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12)


@given(PAIRS, st.sampled_from(["higher", "lower"]))
def test_nothing_beats_the_frontier(pairs, better):
    found = [Point(str(i), "g", d, v) for i, (d, v) in enumerate(pairs)]
    best = frontier(found, better)
    sign = 1 if better == "higher" else -1
    for point in found:
        beats = [
            p for p in best if p.density <= point.density and sign * p.value >= sign * point.value
        ]
        assert beats  # on the frontier itself, or no better than something on it
    for point in best:
        assert not any(
            p.density <= point.density and sign * p.value > sign * point.value for p in found
        )


def test_rows_of_result_files_are_points():
    rows = [
        {"task": "needle", "length": 4096, "policy": "full", "accuracy": 1.0, "n": 48},
        {"task": "needle", "length": 4096, "policy": "retained", "width": 256, "density": 0.1,
         "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "kl": 0.2, "n": 48},
        {"task": "needle", "length": 4096, "policy": "unmeasured", "accuracy": 0.5},
    ]  # fmt: skip
    full, kept = points(rows)
    assert (full.density, full.value, full.reference, full.group) == (
        1.0, 100.0, True, "needle, 4,096 tokens")  # fmt: skip
    assert (kept.density, kept.value, kept.low, kept.high, kept.width) == (0.1, 50.0, 40, 60, 256)
    assert [p.value for p in points(rows, "kl")] == [0.0, 0.2]
    with pytest.raises(ValueError, match="one of"):
        points(rows, "beauty")


def test_the_plot_is_a_picture_of_its_points(tmp_path):
    """Denser is further right, better is higher up, in both sizes; the same for the PNG's file."""
    found = [Point("full", "g", 1.0, 100.0), Point("a", "g", 0.01, 50.0, 40.0, 60.0),
             Point("b", "g", 0.1, 75.0)]  # fmt: skip
    drawn = Parsed(pareto(found, "accuracy", {"full": None, "a": 0, "b": 0}, "quality"))
    assert len(drawn.all("svg")) == 2
    circles = [(float(c["cx"]), float(c["cy"])) for c in drawn.all("circle")]
    for first, second in (circles[:2], circles[2:]):
        assert first[0] < second[0] and first[1] > second[1]
    assert all("b: 75 at 10 % density" in s["aria-label"] for s in drawn.all("svg"))
    pytest.importorskip("matplotlib")
    from dynmask.evals.plots import pareto_of

    rows = [{"policy": "full", "accuracy": 1.0, "kl": None, "task": "t"},
            {"policy": "a", "density": 0.1, "accuracy": 0.5, "kl": 0.1, "task": "t"}]  # fmt: skip
    path = pareto_of(rows, tmp_path / "p.png", title="t", caption="c")
    assert path.read_bytes()[:4] == b"\x89PNG" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="density and a result"):
        pareto_of([{"policy": "a"}], tmp_path / "q.png", title="t", caption="c")


# --- masks of a prompt -------------------------------------------------------------------------


def unpacked(packed, *shape):
    return torch.tensor(list(levels(packed, shape[0] * shape[1]))).reshape(shape)


def test_a_prompt_shows_the_masks_that_ran(read):
    """Sinks and a window are known by hand: every pixel, every bin, every count."""
    (one,) = read["policies"]  # what reads everything is left out
    n = read["tokens"]
    mask = LifetimeMask.streaming(n, 2, 20)
    assert one["policy"] == "streaming" and PIXELS < n < 480
    assert one["density"] == pytest.approx(float(mask.density()), rel=1e-5)
    last = mask.dense()[0, 0, -1].float()
    strip = unpacked(one["prefill"]["strip"], 1, n)[0]
    assert torch.equal(strip, (last * SCALE).round().long())
    assert one["prefill"]["share"] == pytest.approx(float(last.mean()))
    # The decoded token's window has gone on by one.
    decoded = unpacked(one["decode"]["strip"], 1, n)[0] > 0
    assert decoded.sum() == 2 + 19 and decoded[-19:].all()
    assert len(one["maps"]) == 6
    for drawn in one["maps"]:
        pixels = unpacked(drawn["pixels"], *drawn["side"])
        assert pixels.shape == (PIXELS, PIXELS)
        assert (pixels[0, 2:] == ABOVE).all() and (pixels.diagonal() != ABOVE).all()
        assert (pixels[60:, 8:40] == 0).any() and (pixels[:, 0] > 0).all()


def test_the_tokens_of_the_answer_are_marked(read):
    (place,) = read["answers"]
    ids = stand_in_tokenizer()(PROMPT)["input_ids"]
    assert "7364" in stand_in_tokenizer().decode(ids[place["start"] : place["end"]])
    assert place["text"] == "7364" and place["end"] < 40
    (one,) = read["policies"]
    assert one["prefill"]["answer"] == 0.0  # long before the window
    ranges = [(r["start"], r["end"]) for r in one["ranges"]]
    n = read["tokens"]
    assert ranges == [(0, 2), (n - 20, n)]
    assert all(r["share"] == 1.0 for r in one["ranges"])
    text = Parsed(page([Report("t", HEADER, (row("full", "g", [1], 1.0),), reading=read)])).text
    assert "0 % of the maps read the answer" in text and f"{n - 20:,}–{n - 1:,}" in text


def test_phases_in_which_all_is_read_are_told():
    policies = {"quest": Quest(budget=32, page=8, dense_layers=1),
                "slash": VerticalSlash(8, 8, sinks=2, window=4)}  # fmt: skip
    found = reading(stand_in_model(), stand_in_tokenizer(), policies, PROMPT, measure_rows=0)
    quest, slash = found["policies"]
    assert quest["prefill"]["share"] == 1 and 0 < quest["decode"]["share"] < 1
    assert slash["prefill"]["share"] < 1 and slash["decode"] is None
    assert quest["kept_mass"] is None and found["answers"] == []
    text = Parsed(page([Report("t", HEADER, (row("full", "g", [1], 1.0),), reading=found)])).text
    assert "prefill of this prompt reads everything" in text and "Decoding reads everything" in text


def test_what_decoding_reads_under_keep_is_told():
    keep = {"gated": Gated(sinks=1, window=4, columns=3, last=4, decode="keep")}
    found = reading(stand_in_model(), stand_in_tokenizer(), keep, PROMPT, measure_rows=0)
    assert [one["keeps"] for one in found["policies"]] == [True]
    text = Parsed(page([Report("t", HEADER, (row("full", "g", [1], 1.0),), reading=found)])).text
    assert "reads what the prompt chose" in text and "Decoding reads everything" not in text


def test_masks_of_kv_heads_are_shown_for_their_query_heads():
    """H2O evicts per kv head; the stand-in has two of them for four query heads."""
    policies = {"h2o": H2O(width=40, block=4), "streaming": Streaming(sinks=2, window=20)}
    found = reading(stand_in_model(), stand_in_tokenizer(), policies, PROMPT, measure_rows=0)
    h2o, streaming = found["policies"]
    drawn = {(one["layer"], one["head"]): one["pixels"] for one in h2o["maps"]}
    assert list(drawn) == [(one["layer"], one["head"]) for one in streaming["maps"]]
    assert {head for _, head in drawn} == {0, 1, 2, 3}
    twins = [(at, (at[0], at[1] ^ 1)) for at in drawn if (at[0], at[1] ^ 1) in drawn]
    assert twins and all(drawn[a] == drawn[b] for a, b in twins)
    assert len(set(drawn.values())) > 1
    assert 0 < h2o["prefill"]["share"] * found["tokens"] <= 40
    assert 0 < h2o["decode"]["share"] * found["tokens"] <= 40  # by what its cache holds


def test_a_policy_that_evicts_shows_what_a_decoded_token_reads():
    """Its scores are asked for again with every token; the picture stays the prefill's."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        modules = tuple(PairScore(2, 16, 8) for _ in range(2))
    policy = Retained(modules, width=15, window=5, sinks=1)
    found = reading(stand_in_model(), stand_in_tokenizer(), {"r": policy}, PROMPT, measure_rows=0)
    (one,) = found["policies"]
    n = found["tokens"]
    assert one["prefill"]["share"] * n == pytest.approx(15)
    assert one["decode"]["share"] * n == pytest.approx(14)  # and the decoded token itself
    assert all(drawn["side"] == [PIXELS, PIXELS] for drawn in one["maps"])
    assert all(drawn["density"] < 0.3 for drawn in one["maps"])


def test_the_longest_ranges_are_listed_in_the_order_of_the_text():
    lengths = [3, 1, 5, 2, 9, 4, 8, 7]
    share = torch.cat([torch.tensor([0.1] + [0.6 + 0.01 * k] * k) for k in lengths])
    listed = _ranges(share, list(range(5, 5 + len(share))), stand_in_tokenizer())
    assert [one["end"] - one["start"] for one in listed] == [3, 5, 9, 4, 8, 7]
    assert all(one["share"] == pytest.approx(0.6 + 0.01 * (one["end"] - one["start"]))
               for one in listed)  # fmt: skip
    assert all(float(share[one["start"] - 1]) < 0.5 for one in listed)
    few = _ranges(torch.tensor([0.1, 0.3, 0.3, 0.0]), [5, 6, 7, 8], stand_in_tokenizer())
    assert [(one["start"], one["end"]) for one in few] == [(1, 3)]  # the most read, where few are
    assert _ranges(torch.zeros(3), [5, 6, 7], stand_in_tokenizer()) == []


def test_reading_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        reading(stand_in_model(), stand_in_tokenizer(), POLICIES, "a")
    with pytest.raises(ValueError, match="policies"):
        reading(stand_in_model(), stand_in_tokenizer(), {"x": "streaming"}, PROMPT)


def test_pictures_are_valid_and_keep_every_level():
    data = bytes([0, 1, SCALE, ABOVE, 7, 100])
    picture = png(data, 2, 3)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(picture):
        (size,) = struct.unpack(">I", picture[at : at + 4])
        name, body = picture[at + 4 : at + 8], picture[at + 8 : at + 8 + size]
        assert struct.unpack(">I", picture[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + body
        )
        chunks[name] = body
        at += 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    assert zlib.decompress(chunks[b"IDAT"]) == b"\0" + data[:3] + b"\0" + data[3:]
    strength = chunks[b"tRNS"]
    assert len(strength) == 256 and len(chunks[b"PLTE"]) == 768
    assert list(strength[:ABOVE]) == sorted(strength[:ABOVE]) and strength[0] == 0 < strength[1]
    pytest.importorskip("PIL")
    from io import BytesIO

    from PIL import Image

    alpha = Image.open(BytesIO(picture)).convert("RGBA").getchannel("A")
    assert alpha.tobytes() == bytes(strength[i] for i in data)


@pytest.mark.parametrize(
    "packed", ["", "no base64!", base64.b64encode(zlib.compress(b"abc")).decode(), 7]
)
def test_broken_pictures_are_refused(packed):
    with pytest.raises(ValueError, match="report unchanged"):
        image(packed, 2, 3, "alt")


# --- the command -------------------------------------------------------------------------------


def test_the_command_shows_the_users_prompt(tmp_path, capsys):
    from dynmask import cli
    from tests.stand_in import save_stand_in

    own = tmp_path / "own <b>.txt"
    own.write_text("Is this a picture? " * 20 + HOSTILE)
    out = tmp_path / "out"
    call = [
        "evaluate", "--model", str(save_stand_in(tmp_path / "m")), "--task", "needle", "--n", "1",
        "--length", "448", "--quiet", "--no-timing", "--no-plots", "--policy", "full",
        "--policy", "streaming:window=16", "--out", str(out),
    ]  # fmt: skip
    assert cli.main([*call, "--file", str(own)]) == 0
    found = Parsed((out / "report.html").read_text(encoding="utf-8"))
    assert "your file own <b>.txt" in found.text and HOSTILE in page_text(found)
    assert len(found.all("script")) == 1 and "--no-plots --policy full" in found.text
    saved = Report.load(out / "needle.json")
    assert saved.reading["source"].startswith("your file") and saved.reading["answers"] == []
    assert cli.main(call) == 0
    saved = Report.load(out / "needle.json")
    assert saved.reading["source"] == "item 0 of needle" and saved.reading["answers"]
    assert cli.main([*call, "--no-page"]) == 0
    assert Report.load(out / "needle.json").reading is None
    capsys.readouterr()
    for wrong in (["--prompt", "a", "--no-page"], ["--file", str(own), "--no-page"]):
        assert cli.main([*call, *wrong]) == 2
        assert f"{wrong[0]}: expected with --out" in capsys.readouterr().err


def test_a_page_that_cannot_be_drawn_leaves_the_report(tmp_path, capsys, monkeypatch):
    from dynmask import cli
    from tests.stand_in import save_stand_in

    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynmask.evals.reading.greedy", stop)
    call = [
        "evaluate", "--model", str(save_stand_in(tmp_path / "m")), "--task", "needle", "--n", "1",
        "--length", "448", "--quiet", "--no-timing", "--no-plots", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(call) == 130
    assert Report.load(tmp_path / "out" / "needle.json").complete
    assert "What is read of a prompt" not in (tmp_path / "out" / "report.html").read_text()
    assert "the page has no masks" in capsys.readouterr().err
