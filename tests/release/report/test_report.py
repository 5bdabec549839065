"""The report: one safe, self-contained, repeatable page of what the run folder holds."""

import re
from html.parser import HTMLParser

import pytest

from cognica_poe.errors import UserError
from cognica_poe.files import Manifest, write_bytes
from cognica_poe.release.publish.tree import content_id
from cognica_poe.release.report import drawing
from cognica_poe.release.report.html import write_report
from cognica_poe.release.report.run_folder import read_run
from cognica_poe.seals import sealed_line, write_sealed
from tests.release.records import make_record, make_run

REVISION = Manifest("release", {"a": "0" * 64}).data()
COMMIT = content_id(REVISION)
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(HTMLParser):
    """Checks nesting and collects tags, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "tiny"), make_run(folder / "tiny-bp", name="tiny-bp", path="plain")]
    hub = folder / "tiny" / "release" / "hub" / "models--cognica--tiny-poe"
    write_bytes(hub / "snapshots" / COMMIT / "MANIFEST.sha256", REVISION)
    for name in ("step-0", "step-100", "step-300", "main"):
        write_bytes(hub / "refs" / name, COMMIT.encode())
    file = write_report(runs, folder / "report")
    return runs, file, file.read_text()


def test_page_is_well_formed_and_needs_nothing_from_outside(report):
    _, file, text = report
    assert file.name == "index.html"
    page = _Page(text)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert "default-src 'none'" in text
    for _, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("href", "src", "xlink:href"):
            assert attributes.get(key, "#").startswith("#")
    assert not re.findall(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids)), "ids are unique over all plots"
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {a["xlink:href"][1:] for _, a in page.tags if "xlink:href" in a}
    assert used and used <= set(page.ids)


def test_plots_follow_the_theme(report):
    text = report[2]
    assert drawing.INK not in text and drawing.GRID not in text
    assert "fill: var(--ink)" in text and "stroke: var(--grid)" in text
    assert not re.search(r"fill: #f{6}\b", text), "no white panel behind a plot in the dark theme"


def test_every_plot_and_every_record_is_shown(report):
    text = report[2]
    page = _Page(text)
    plots = [a for tag, a in page.tags if tag == "svg"]
    assert len(plots) == 3 + 10 + 5
    assert all(a["aria-label"] and a["role"] == "img" for a in plots)
    for title in ("Training loss by stage", "The pool against its parts", "WAND exit stage", "Speculative acceptance"):
        assert f"<h3>{title}</h3>" in text
    for step in (0, 100, 200, 300):
        assert f"{make_record(step)['bpb']['full']:.4f}" in page.text
    assert "primed xz" in page.text and "docs|x" in page.text
    assert page.text.count("resumed") >= 2 * 3, "a resume is marked in the curves of both runs"
    assert len(re.findall(r"120</td>\s*<td[^>]*>resume</td>", text)) == 2
    assert 'revision="step-300"' in page.text and COMMIT in page.text


def test_what_a_model_wrote_cannot_act(report):
    text = report[2]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert "\u202e" not in text and "\x1b" not in text and "U+202E" in text
    assert "<small> enough" not in text


def test_same_folders_same_bytes(report, tmp_path):
    runs, _, text = report
    assert write_report(runs, tmp_path / "again.html").read_text() == text


def test_a_changed_record_changes_the_plot(tmp_path):
    run = make_run(tmp_path / "a", steps=(0, 100))
    before = re.findall(r"<svg.*?</svg>", write_report([run], tmp_path).read_text(), re.S)
    record = make_record(100)
    record["wand_bounds"][1] += 0.3
    write_sealed(run / "analysis" / "step-100.json", record)
    after = re.findall(r"<svg.*?</svg>", write_report([run], tmp_path).read_text(), re.S)
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 1


def test_records_alone_are_enough(tmp_path):
    bare = {key: make_record(5)[key] for key in ("step", "model", "bpb")}
    write_sealed(tmp_path / "analysis" / "step-5.json", bare)
    text = write_report([tmp_path], tmp_path / "report").read_text()
    assert "Bits per byte by path" in text and "WAND bounds</h3>" not in text
    _Page(text)


def test_a_resumed_step_counts_once_with_its_last_line(tmp_path):
    run = make_run(tmp_path / "a", steps=(0, 10))
    lines = [sealed_line({"step": step, "loss": loss}) for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0))]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    assert [line["loss"] for line in read_run(run).metrics] == [5.0, 3.0]


@pytest.mark.parametrize(
    "name",
    ["recipe.json", "metrics.jsonl", "events.jsonl", "analysis/step-0.json", "data/manifest.json",
     "release/hub/models--a--b/refs/main", f"release/hub/models--a--b/snapshots/{COMMIT}/MANIFEST.sha256"],
)  # fmt: skip
def test_a_changed_byte_is_named(tmp_path, name):
    run = make_run(tmp_path / "a", steps=(0, 10))
    hub = run / "release" / "hub" / "models--a--b"
    write_bytes(hub / "snapshots" / COMMIT / "MANIFEST.sha256", REVISION)
    write_bytes(hub / "refs" / "main", COMMIT.encode())
    read_run(run)
    file = run / name
    data = file.read_bytes()
    at = data.find(b"0", 20)
    file.write_bytes(data[:at] + b"1" + data[at + 1 :])
    with pytest.raises(UserError) as caught:
        read_run(run)
    known = file.parent if name.endswith("refs/main") else file
    assert str(known) in str(caught.value) and "\n" not in str(caught.value)


def test_a_page_that_is_not_ours_stays(tmp_path):
    run = make_run(tmp_path / "run")
    for out in (tmp_path / "site", tmp_path / "page.html"):
        file = out if out.suffix else out / "index.html"
        file.parent.mkdir(exist_ok=True)
        file.write_text("<!doctype html>my page")
        with pytest.raises(UserError, match="is not a report made by cognica-poe"):
            write_report([run], out)
        assert file.read_text() == "<!doctype html>my page"
        file.unlink()
        write_report([run], out)
        assert write_report([run], out).read_bytes() == file.read_bytes()


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path)
    with pytest.raises(UserError, match="run folder not found"):
        write_report([tmp_path / "none"], tmp_path)
    with pytest.raises(UserError, match=r"no step-N\.json"):
        write_report([tmp_path], tmp_path)
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "step-1.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        write_report([tmp_path], tmp_path)
    write_sealed(tmp_path / "analysis" / "step-1.json", make_record(2))
    with pytest.raises(UserError, match="is of step 2"):
        write_report([tmp_path], tmp_path)
    write_sealed(tmp_path / "analysis" / "step-1.json", {})
    with pytest.raises(UserError, match="no step or bits per byte"):
        write_report([tmp_path], tmp_path)


def test_thinning_and_smoothing_keep_the_mean_and_the_ends():
    xs = list(range(1000))
    thin_x, thin_y = drawing.thin(xs, [2.0 * x for x in xs], 100)
    assert len(thin_x) == 100 and all(y == pytest.approx(2 * x) for x, y in zip(thin_x, thin_y, strict=True))
    ramp = drawing.smooth([float(x) for x in xs])
    assert ramp == pytest.approx(xs), "a centred average does not lag behind a ramp"


def test_every_section_is_listed_and_headings_say_what_the_run_is(report, tmp_path):
    page = _Page(report[2])
    links = [a["href"][1:] for tag, a in page.tags if tag == "a"]
    assert len(links) > 20 and set(links) <= set(page.ids) and len(links) == len(set(links))
    alone = write_report([make_run(tmp_path / "run")], tmp_path / "one.html").read_text()
    assert '<h2 id="r0-run">What was trained: 4 stages of 2, 2, 2, 2 layers, 4.12M parameters' in alone
    assert "trained on docs, step 300, 4 analysed checkpoints" in alone


def test_an_axis_has_ticks_that_can_be_read_and_cuts_no_interval():
    from matplotlib.figure import Figure

    for low, high in ((1.35, 2.41), (0.72, 0.99), (1.5, 2.3), (2.0, 40.0), (0.9, 1.0), (3.0, 9.5)):
        axes = Figure().add_subplot()
        axes.plot([0, 1], [low, high])
        drawing.wide_range(axes, [low, high])
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
        assert bottom <= low and high <= top and 4 <= len(ticks) <= 9, (low, high, ticks)


def test_what_happened_is_marked(tmp_path):
    run = make_run(tmp_path / "a", steps=(0, 10))
    lines = [{"step": step, "loss": 5.0, "lr_scale": 1.0, "epoch": int(step > 4)} for step in range(1, 11)]
    lines += [{"step": step, "validation": {"full": 3.0 - step / 9, "bytes": 900}} for step in (4, 8)]
    (run / "metrics.jsonl").write_text("".join(sealed_line(line) + "\n" for line in lines))
    events = [{"step": 6, "event": "roll back", "to": 3}, {"step": 7, "event": "resume", "restarts": 1}]
    (run / "events.jsonl").write_text("".join(sealed_line(event) + "\n" for event in events))
    text = write_report([run], tmp_path / "page.html").read_text()
    for word in ("epoch begins", "rolled back", "resumed", "new minimum"):
        assert f">{word}</text>" in text
    assert "<h3>Validation in training</h3>" in text and "900 bytes" in text
