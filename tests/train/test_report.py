"""The report of a run: the numbers it states, what it draws, and that the page needs and runs nothing from outside."""

import base64
import io
import json
import math
import re
import struct
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from moejax.config import Config, ConfigError, Mesh, Model, MoE, Train, to_json
from moejax.train import report
from moejax.train.metrics import MetricsLog

EXPERTS = 4


def a_run(run_dir, steps=6, layers=2, pattern="M", change=lambda record: record, **files):
    """A run folder as the training loop leaves it; the loss of step s is 4 / s."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = Config(name="tiny & <small>", train=Train(steps=10), mesh=Mesh(data=2, expert=2),
                    model=Model(layers=layers, pattern=pattern, moe=MoE(experts=EXPERTS)))
    (run_dir / "config.json").write_text(to_json(config))
    for name, lines in files.items():
        (run_dir / f"{name}.{'json' if name == 'summary' else 'jsonl'}").write_text("\n".join(map(json.dumps, lines)))
    count = config.model.layer_kinds().count("M")
    with MetricsLog(run_dir) as log:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": 4 / step, "balance_loss": 1.0, "z_loss": 0.5, "grad_norm": 1.0, "lr": 1e-3,
                      "tokens": step * 1000, "tokens_per_s": 10.0 if step == 1 else 5000.0, "mfu": None,
                      "drop_fraction": [0.1] * count, "expert_load": [[0.4, 0.3, 0.2, 0.1]] * count}
            log.write(change(record))
    return run_dir


class Page(HTMLParser):
    """What a browser would make of a page: its facts, its texts by tag, all tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], {}, []
        self.feed(text)
        self.facts = dict(zip(self.texts.get("dt", []), self.texts.get("dd", []), strict=True))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # the page is well formed

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


def read(run_dir):
    path = report.write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text("utf-8"))


def facts(run_dir):
    return dict(report.facts(report.read_run(run_dir)))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run with everything that a run can have; MoE layers are 1 and 3 of four."""
    def change(record):
        more = {1: {"unigram_loss": 2.0}, 2: {"validation_loss": 3.0}, 4: {"validation_loss": 1.5, "mfu": 0.25}}
        return record | more.get(record["step"], {})

    samples = [{"prompt": "<b>", "text": "<script>alert('x')</script>\n\x00\x07&amp;"},
               {"prompt": "def ", "text": "def f()"}]
    summary = {"parameters": 1_234_567, "active_parameters": 654_321, "devices": 4, "jax": "0.10.2", "python": "3.11.9"}
    run_dir = a_run(tmp_path_factory.mktemp("full"), 6, 4, "DM", change, samples=samples, summary=[summary])
    page = read(run_dir)
    page.text, page.png = (run_dir / "report.html").read_text("utf-8"), (run_dir / "report.png").read_bytes()
    return page


def test_the_summary_states_the_numbers_of_the_run(full):
    assert full.facts == {
        "Steps": "6 of 10", "Tokens": "6,000",
        "Final training loss": "0.6667 nats\n0.962 bits per byte",  # 4 / 6 / 0.693147 = 0.96180
        "Validation loss": "1.5000 nats\n2.164 bits per byte",
        "Unigram loss": "2.0000 nats\n2.885 bits per byte",
        "Validation / unigram": "0.750",
        "Tokens per second, median": "5,000", "Model FLOP/s utilisation": "25.0%", "Mesh": "data 2 × expert 2",
        "Parameters": "1.235 million", "Active parameters": "654,321", "Devices": "4", "JAX": "0.10.2",
        "Python": "3.11.9"}
    assert full.texts["h1"] == ["tiny & <small>"]
    assert json.loads(full.texts["details"][0].removeprefix("Configuration"))["mesh"]["expert"] == 2


def test_what_the_run_lacks_is_left_out_and_a_torn_last_line_too(tmp_path):
    with (a_run(tmp_path) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss')
    assert list(facts(tmp_path)) == ["Steps", "Tokens", "Final training loss", "Tokens per second, median", "Mesh"]
    assert facts(tmp_path)["Steps"] == "6 of 10"


def test_the_page_needs_nothing_from_outside_and_runs_nothing(full):
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(full.tags)
    links = [value for name, value in full.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=\s]*", "", full.text)  # no address of any scheme
    assert "@import" not in full.text and set(re.findall(r"url\((.)", full.text)) == {"#"}
    assert [value for name, value in full.attributes if name == "content" and "default-src 'none'" in value]


def test_ids_are_unique_and_what_refers_to_them_finds_them(full):
    ids = [value for name, value in full.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", full.text) + re.findall(r'href="#([^"]*)"', full.text)
    assert used and set(used) <= set(ids)


def test_samples_are_shown_as_text(full):
    assert full.texts["pre"][:2] == ["<b><script>alert('x')</script>\n\ufffd\ufffd&amp;", "def f()"]
    assert full.texts["b"] == ["<b>", "def "]


def test_every_colour_follows_the_scheme_of_the_reader(full):
    pictures = " ".join(re.findall(r"<svg.*?</svg>", full.text, re.DOTALL))
    assert set(re.findall(r"var\(--([a-z]+)\)", pictures)) == set(report.COLOURS)
    for light, dark in report.COLOURS.values():
        assert light not in pictures and light in full.text and dark in full.text


def test_the_pictures_of_a_mixture_and_of_a_dense_model(full, tmp_path):
    dense = read(a_run(tmp_path, pattern="D"))
    assert full.tags.count("figure") == 6 and dense.tags.count("figure") == 3
    titles = [text for text in full.texts["text"] if "layer" in text]
    assert titles == ["layer 1", "layer 3"] * 2  # drops, then load
    assert not [text for text in dense.texts["text"] if "layer" in text]
    for png in (full.png, (tmp_path / "report.png").read_bytes()):
        assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (1200, 700)


@pytest.mark.parametrize("pattern", ["M", "D"])
def test_a_run_of_one_step(tmp_path, pattern):
    page = read(a_run(tmp_path, steps=1, pattern=pattern))
    assert page.facts["Final training loss"].startswith("4.0000 nats") and page.facts["Steps"] == "1 of 10"


def test_a_diverged_run_says_so(tmp_path):
    def change(record):
        bad = {"loss": math.nan, "validation_loss": math.nan, "grad_norm": math.inf, "drop_fraction": [math.nan] * 2,
               "expert_load": [[math.nan] * EXPERTS] * 2}
        return record | (bad if record["step"] > 2 else {"validation_loss": 3.0})

    page = read(a_run(tmp_path, change=change))
    assert page.facts["Final training loss"] == page.facts["Validation loss"] == "not finite"


def test_what_a_run_skipped_and_where_it_went_back(tmp_path):
    """Of steps done again the last record counts, and those not done again yet do not."""
    run_dir = a_run(tmp_path, change=lambda record: record | {
        "bad": int(record["step"] > 4), "skipped": max(record["step"] - 4, 0), "goodput": 0.875 - record["step"] / 100})
    assert facts(run_dir)["Steps skipped"] == "2" and facts(run_dir)["Goodput"] == "81.5%"
    assert "Gone back" not in facts(run_dir)
    log = run_dir / "metrics.jsonl"
    sixth = log.read_text().splitlines()[-1]
    with log.open("a") as file:
        file.write('{"event": "rewind", "step": 6, "to": 4, "offset": 2}\n')
    assert facts(run_dir)["Steps"] == "4 of 10" and facts(run_dir)["Gone back"] == "from step 6 to 4"
    assert "Steps skipped" not in facts(run_dir)  # the health at step 4 counts none
    with log.open("a") as file:
        file.write('{"step": 5, "loss": 3.0, "skipped": 0}\n{"event": "rewind", "step": 1005, "to": 4, "offset": 3}\n'
                   + sixth.replace('"step": 6', '"step": 5') + "\n")
    page = read(run_dir)
    assert page.facts["Gone back"] == "from step 6 to 4, from step 1,005 to 4" and page.facts["Steps"] == "5 of 10"
    assert page.facts["Steps skipped"] == "2" and page.facts["Final training loss"].startswith("0.6667 nats")


def test_a_run_that_was_never_finite(tmp_path):
    page = read(a_run(tmp_path, change=lambda record: {
        key: None if isinstance(value, float) else value for key, value in record.items()}))
    assert page.facts["Final training loss"] == "not finite" and "Tokens per second, median" not in page.facts


def test_wrong_folders_are_refused_with_what_is_missing(tmp_path):
    good = a_run(tmp_path / "good")
    for name, message in (("god", f"god does not exist; give a training run's run_dir, such as {good}"),
                          ("empty", "empty has no config.json; give a training run's run_dir")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigError) as error:
            report.write_report(tmp_path / name)
        assert message in error.value.problems[0]
    (tmp_path / "good" / "metrics.jsonl").write_text('{"st')
    with pytest.raises(ConfigError, match=r"holds none; train first: moejax train CONFIG run_dir=.*good"):
        report.write_report(tmp_path / "good")
    (tmp_path / "good" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "good" / "config.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: a config is a JSON object"):
        report.write_report(tmp_path / "good")


def test_smooth_takes_the_mean_around_a_step():
    # 100 steps: the reach is 2, so a spike of 5 spreads as 1 over 5 steps; the first steps reach less far
    values = np.zeros(100)
    values[[1, 50]] = [3, 5]
    smoothed = report.smooth(values)
    np.testing.assert_allclose(smoothed[48:53], 1)
    np.testing.assert_allclose(smoothed[:5], [0, 1, 3 / 5, 3 / 5, 0])
    assert smoothed[47] == smoothed[53] == 0
    values[49] = np.nan  # 4 finite steps are left around step 50
    assert report.smooth(values)[50] == 5 / 4 and np.isnan(report.smooth(values)[49])


def test_a_long_curve_stays_small_and_keeps_its_spikes():
    """Matplotlib leaves out the points that nobody could see."""
    steps, values, file = np.arange(1e5), np.random.default_rng(0).normal(size=100_000), io.StringIO()
    values[[1234, 70_000]] = [50, -50]
    values[90_000:95_000] = np.nan
    with matplotlib.rc_context(report.STYLE):
        figure = Figure()
        axes = figure.subplots()
        report.curve(axes, steps, values)
        figure.savefig(file, format="svg")
    line = max(re.findall(r' d="([^"]*)"', file.getvalue()), key=len)
    assert len(line) < 30_000
    drawn = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", line)]
    places = axes.transData.transform([(1234, 50), (70_000, -50)]) * 72 / figure.dpi
    for x, y in places:
        assert min(abs(x - at) + abs(figure.get_figheight() * 72 - y - height) for at, height in drawn) < 1


def test_a_deep_model_shows_eight_layers_over_its_whole_depth(tmp_path):
    run = report.read_run(a_run(tmp_path, steps=2, layers=120))
    names = [name for _, name in run.shown()]
    assert len(names) == report.LAYERS and names[0] == "layer 0" and names[-1] == "layer 119"
    gaps = np.diff([row for row, _ in run.shown()])
    assert gaps.min() == gaps.max() == 17  # 119 / 7


def test_the_heat_map_is_the_load_in_multiples_of_an_even_share(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "COLUMNS", 3)
    run = report.read_run(a_run(tmp_path, steps=6, layers=1, change=lambda record: record | {
        "expert_load": [[0.5, 0.5, 0, 0] if record["step"] <= 3 else [0.25] * 4]}))
    figure = Figure()
    report.draw_load(figure, run)
    image = figure.axes[0].images[0]
    # steps 1-2, 3-4, 5-6: twice an even share, half of the time, balance
    np.testing.assert_allclose(image.get_array(), [[2, 1.5, 1], [2, 1.5, 1], [0, 0.5, 1], [0, 0.5, 1]])
    assert (image.norm.vmin + image.norm.vmax) / 2 == 1
    assert image.cmap(0.5)[3] < 0.01 < 0.99 < image.cmap(0.0)[3] == image.cmap(1.0)[3]  # balance is see-through


def test_the_schedule_of_a_pipeline_and_its_bubble(tmp_path):
    run = a_run(tmp_path)
    config = Config(train=Train(steps=10, microbatches=4), mesh=Mesh(pipeline=2, fake_devices=2))
    (run / "config.json").write_text(to_json(config))
    found = {"schedule": "1f1b", "bubble": 0.2, "bubble_measured": 0.125, "step_s": 0.8, "busy_s": 0.7}
    (run / "pipeline.json").write_text(json.dumps(found))
    report.write_report(run)
    page = Page((run / "report.html").read_text("utf-8"))
    assert page.facts["Pipeline"] == "1f1b, 4 microbatches"
    assert (page.facts["Bubble, counted"], page.facts["Bubble, measured"]) == ("20.0%", "12.5%")
    assert page.tags.count("rect") >= 2 * 2 * 4  # F and B of 4 microbatches on 2 stages
    assert any("0.8 s" in text and "0.7 s" in text for text in page.texts["p"])


def test_a_table_that_is_gone_leaves_the_rest_of_the_report(tmp_path):
    run = a_run(tmp_path)
    (run / "config.json").write_text(to_json(Config(mesh=Mesh(pipeline=2, schedule="gone.csv"))))
    report.write_report(run)
    assert "Bubble, counted" not in Page((run / "report.html").read_text("utf-8")).facts


def with_pictures(tmp_path, *samples):
    (tmp_path / "a.png").write_bytes(b"\x89PNG of <nothing>")
    run = a_run(tmp_path / "run", samples=[{"prompt": "def ", "text": "f()"}, *(
        {"prompt": "<image>", "images": [str(tmp_path / "a.png")]} | each for each in samples)])
    return Page(report.page(report.read_run(run), ""))


def test_a_picture_stands_beside_its_truth_and_what_was_read(tmp_path):
    page = with_pictures(tmp_path, {"truth": "<b> = 1", "text": "<b> = 7&\n", "blind": "<i>"})
    links = [value for name, value in page.attributes if name == "src"]
    assert page.tags.count("img") == 1 and links == [
        "data:image/png;base64," + base64.b64encode(b"\x89PNG of <nothing>").decode()]
    assert page.texts["dd"][-3:] == ["<b> = 1", "<b> = 7&\u23ce\n", "<i>\u2026"]
    assert page.texts["mark"] == ["7&\u23ce\n", "i", "\u2026"]
    assert page.texts["pre"][0] == "def f()"
    assert "<image>" not in page.texts["pre"][-1]


def test_a_picture_that_is_gone_leaves_the_texts(tmp_path):
    page = with_pictures(tmp_path, {"images": ["gone.png", str(tmp_path), str(tmp_path / "run" / "config.json")],
                                    "truth": "x", "text": "x"})
    assert "img" not in page.tags and page.texts["dd"][-2:] == ["x", "x"] and "mark" not in page.tags


def test_an_answer_about_a_picture_has_no_truth_to_differ_from(tmp_path):
    page = with_pictures(tmp_path, {"prompt": "What is this? <image>", "text": "a <cat>"})
    assert page.texts["dd"][-2:] == ["What is this? <image>", "a <cat>"] and "mark" not in page.tags
