"""The report in a real browser.

Without Chromium these tests fail, since a report that nobody opened is not tested; set
QEFF_PROXY_TEST_WITHOUT_BROWSER=1 to leave them out.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import subprocess
import zlib

import numpy as np
import pytest
from qeff_proxy.compare import NoiseFloor, Tolerances, compare_dumps
from qeff_proxy.compare.report import MAX_COLUMNS, build_report
from qeff_proxy.dump import DumpWriter


@pytest.fixture(scope="session")
def page(good, bad):
    return build_report(compare_dumps(good, bad))


def test_the_page_needs_nothing_but_itself(page):
    assert not re.search(
        r"""(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", page
    )
    assert "default-src 'none'" in page


def test_a_model_that_is_called_like_a_mark_of_the_page(stack, good, tmp_path):
    named = stack(tmp_path / "named", model="@DATA@ @SCRIPT@ @VERDICT@")
    page = build_report(compare_dumps(named, good))
    assert page.count("<title>Dump comparison: @DATA@ @SCRIPT@ @VERDICT@</title>") == 1
    assert page.count('id="data"') == page.count('id="verdict"') == 1
    assert page.count('"tensors": ') == 1


def test_the_verdict_is_there_without_a_script(page):
    before = page.split("<script")[0]
    assert "FAILED: of 12 tensors in 5 steps" in before
    assert "First divergence: layer 2, body.out.hidden_states.layer-02 in prefill-0000." in before


def test_plots_and_heat_map_show_every_layer(page, browse):
    shown = browse(
        page,
        """
        const all = (selector) => [...document.querySelectorAll(selector)];
        const texts = (id) => all(`#${id} text`).map((t) => t.textContent);
        return {
          layers: texts("layer-plot"), heat: texts("heat-map"),
          lines: document.querySelectorAll("#layer-plot polyline").length,
          cells: document.querySelectorAll("#heat-map .cell").length,
          wide: document.documentElement.scrollWidth <= innerWidth,
        };
        """,
    )
    assert {"0", "1", "2", "3", "4", "first divergence", "layer of body"} <= set(shown["layers"])
    assert {"layer 0", "layer 4", "body outputs", "prefill-0000"} <= set(shown["heat"])
    assert shown["lines"] == 2
    assert shown["cells"] == 6 * 5
    assert shown["wide"]


def test_hovering_a_cell_tells_its_number(page, browse):
    text = browse(
        page,
        """
        const cell = [...document.querySelectorAll("#heat-map .cell")][2 * 5];
        cell.dispatchEvent(new MouseEvent("mousemove", { clientX: 50, clientY: 50 }));
        return document.getElementById("tip").textContent;
        """,
    )
    assert re.fullmatch(r"layer 2, prefill-0000: [\d.]+% FAILED \(hidden_states\)", text)


def test_the_table_sorts_and_filters(page, browse):
    shown = browse(
        page,
        """
        const find = (selector) => [...document.querySelectorAll(selector)];
        const column = (i) => find("#tensors tbody tr").map((r) => r.cells[i].textContent);
        const named = (name) => find("#tensors th button").find((b) => b.textContent === name);
        const click = (name) => named(name).click();
        const all = column(0).length;
        click("error/peak"); const down = column(9);
        click("error/peak"); const up = column(9);
        const sorted = document.querySelector("th[aria-sort]").getAttribute("aria-sort");
        click("tensor"); const names = column(0);
        document.getElementById("only-failed").click(); const verdicts = column(14);
        const filter = document.getElementById("filter");
        filter.value = "LAYER-03"; filter.dispatchEvent(new Event("input"));
        const shown = document.getElementById("shown").textContent;
        return { all, down, up, sorted, names, verdicts, few: column(0), shown };
        """,
    )
    value = lambda text: float(text.rstrip("%"))  # noqa: E731
    assert shown["all"] == 24
    assert shown["sorted"] == "ascending"
    assert sorted(shown["down"], key=value, reverse=True) == shown["down"]
    assert sorted(shown["up"], key=value) == shown["up"] != shown["down"]
    assert shown["names"] == sorted(shown["names"])
    assert set(shown["verdicts"]) == {"FAILED"}
    assert set(shown["few"]) == {"body.out.present_key.layer-03", "body.out.hidden_states.layer-03"}
    assert shown["shown"] == "4 of 24"


def background(png: bytes) -> tuple[int, ...]:
    """Return the first pixel of an 8-bit RGB or RGBA PNG."""
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    return tuple(zlib.decompress(data)[1:4])


@pytest.mark.parametrize(("scheme", "light"), [(1, True), (0, False)])
def test_the_page_follows_the_colour_scheme(chromium, page, tmp_path, scheme, light):
    (tmp_path / "page.html").write_text(page)
    picture = tmp_path / "page.png"
    subprocess.run(
        [*chromium, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
         f"--blink-settings=preferredColorScheme={scheme}", (tmp_path / "page.html").as_uri()],
        check=True, capture_output=True, timeout=50,
    )  # fmt: skip
    assert (min(background(picture.read_bytes())) > 200) is light


def test_words_of_a_dump_cannot_become_a_script(stack, browse, tmp_path):
    evil = "</script><script>faults.push('ran')</script><img src=x onerror=faults.push(1)>"
    dump = stack(tmp_path / "d", model=evil)
    assert browse(build_report(compare_dumps(dump, dump)), "return document.title").endswith(evil)


def test_no_text_ends_the_element_that_holds_the_data(good, browse):
    comparison = compare_dumps(good, good)
    evil = dataclasses.replace(
        comparison.tensors[0], why="</script><script>faults.push(1)</script>"
    )
    comparison = dataclasses.replace(comparison, tensors=[evil])
    assert browse(build_report(comparison), "return data.tensors[0].why") == evil.why


def test_dumps_without_layers_and_with_nan_have_a_report(tmp_path, browse):
    for name, values in (("r", [1.0, np.nan]), ("c", [1.0, 2.0])):
        with DumpWriter(tmp_path / name, {}) as writer:
            writer.step("prefill", 0, "encoder", {}, {"pooled": np.float32(values)})
    page = build_report(compare_dumps(tmp_path / "r", tmp_path / "c"))
    shown = browse(
        page,
        """
        return [document.getElementById("layers-card").hidden,
                document.querySelector("#tensors tbody tr").cells[9].textContent,
                document.querySelectorAll("#heat-map .cell").length];
        """,
    )
    assert shown == [True, "∞", 1]


def test_many_steps_share_columns(stack, browse, tmp_path):
    dump = stack(tmp_path / "d", steps=2 * MAX_COLUMNS)
    page = build_report(compare_dumps(dump, dump))
    cells = browse(page, "return document.querySelectorAll('#heat-map .cell').length")
    assert cells == 6 * -(-(2 * MAX_COLUMNS + 1) // 3)


def test_the_noise_floor_and_the_limit_are_drawn_by_layer(good, bad, page, browse):
    plain = compare_dumps(good, bad)
    floors = {(t.phase, str(t.name)): NoiseFloor(52.0, 0.01) for t in plain.tensors}
    limits = Tolerances(precision="float16", floors=floors)
    comparison = compare_dumps(good, bad, tolerances=limits)
    drawn = browse(
        build_report(comparison),
        """const lines = [...document.querySelectorAll("#decibel-plot polyline")];
        return [document.getElementById("decibel-card").hidden,
                lines.map((l) => l.getAttribute("stroke-dasharray")),
                COLUMNS.map((c) => c[0]).filter((c) => c === "floor" || c === "limit"),
                data.decibels[Object.keys(data.decibels)[0]][0]]""",
    )
    hidden, dashes, columns, point = drawn
    assert not hidden
    assert dashes == ["2 4", "7 4", "none"] * (len(dashes) // 3)
    assert dashes
    assert columns == ["floor", "limit"]
    assert (point["floor"], point["limit"]) == (52.0, 32.0)
    assert browse(page, "return document.getElementById('decibel-card').hidden")


@pytest.fixture(scope="module")
def fails_late(tmp_path_factory):
    """A tensor whose largest error is in a step that passes: the reference is large there."""
    folder = tmp_path_factory.mktemp("late")
    scales = (1000.0, 1.0, 1.0)
    for name, errors in (("reference", (0, 0, 0)), ("candidate", (0.5, 0.0, 0.1))):
        with DumpWriter(folder / name, {"model": "m"}) as writer:
            for index, (scale, error) in enumerate(zip(scales, errors, strict=True)):
                values = np.linspace(-scale, scale, 8, dtype=np.float32)
                values[3] += error
                writer.step("decode", index, "body", {}, {"hidden_states.0": values})
    limits = Tolerances.parse(["*=peak:0.01"])
    return compare_dumps(folder / "reference", folder / "candidate", tolerances=limits)


def test_the_element_shown_for_a_failing_tensor_is_of_a_step_that_fails(fails_late, browse):
    (tensor,) = fails_late.tensors
    assert tensor.step_passed.tolist() == [True, True, False]
    assert tensor.worst.step == "decode-0002"
    assert tensor.worst.max_abs == pytest.approx(0.1)
    shown = browse(
        build_report(fails_late),
        "return [data.tensors[0].at, data.worst[0].lines[1], data.series[0].points[0].step]",
    )
    assert shown[0] == "decode-0002 [3]"
    assert shown[1].startswith("decode-0002 [3]: ")
    assert shown[2] == "decode-0002"


def test_a_failing_cell_names_the_tensor_that_fails(stack, tmp_path, browse):
    good, bad = stack(tmp_path / "a"), stack(tmp_path / "b", wrong_layer=2)
    limits = Tolerances.parse(["*=peak:0.0000001", "body.out.hidden_states.*=peak:1"])
    page = build_report(compare_dumps(good, bad, tolerances=limits))
    cells = browse(page, "return data.heat.rows.find((r) => r.label === 'layer 3').cells")
    assert {tuple(cell[1:]) for cell in cells} == {(False, "present_key")}


def test_no_column_of_the_table_is_cut_at_1280_pixels(good, bad, browse):
    plain = compare_dumps(good, bad)
    floors = {(t.phase, str(t.name)): NoiseFloor(52.0, 0.01) for t in plain.tensors}
    limits = Tolerances(precision="float16", floors=floors)
    comparison = compare_dumps(good, bad, tolerances=limits)
    script = """
    const box = document.querySelector(".scroll"), last = box.querySelector("th:last-child");
    return [innerWidth, COLUMNS.length, box.scrollWidth - box.clientWidth,
            last.getBoundingClientRect().right <= box.getBoundingClientRect().right];
    """
    longest = dataclasses.replace(
        comparison.tensors[0].worst,
        max_abs=1.2345e-05,
        step="prefill-0000",
        max_abs_at=(1, 31, 1023, 127),
        sqnr=-123.4,
    )
    change = {"worst": longest, "candidate_dtype": "bfloat16"}
    tensors = [dataclasses.replace(t, **change) for t in comparison.tensors]
    page = build_report(dataclasses.replace(comparison, tensors=tensors))
    assert browse(page, script, "--window-size=1280,900") == [1280, 17, 0, True]


def test_facts_are_shown_escaped_and_shortened(good, bad, browse):
    facts = {"input": "'<b>hi</b>'", "date": "2026-01-31", "long": "x" * 5000}
    shown = browse(
        build_report(compare_dumps(good, bad), facts),
        """const all = [...document.querySelectorAll("#verdict dl > *")];
        return all.map((node) => node.textContent);""",
    )
    told = dict(zip(shown[::2], shown[1::2], strict=True))
    assert told["input"] == facts["input"]
    assert told["long"] == "x" * 1000 + "…"
    assert set(told) == {*facts, "reference", "candidate"}
    assert told["candidate"].endswith("stack, numpy")


def test_a_comparison_tells_what_made_its_dumps(tmp_path):
    made = {
        "dtype": "float32", "prompts": ["Hello <there>"], "versions": {"engine": "4.5"},
        "options": {"num_cores": 2, "ctx_len": None, "backend": {"soc": "SM1"}},
        "made_by": {"torch": "2.0", "identity": "ab"},
    }  # fmt: skip
    for name in ("r", "c"):
        with DumpWriter(tmp_path / name, made) as writer:
            writer.step("prefill", 0, "encoder", {}, {"pooled": np.ones(2, np.float32)})
    page = build_report(compare_dumps(tmp_path / "r", tmp_path / "c"))
    assert "<dd>&#x27;Hello &lt;there&gt;&#x27;</dd>" in page
    assert "<dt>candidate: options</dt><dd>num_cores=2, soc=SM1</dd>" in page
    assert "<dt>candidate: versions</dt><dd>torch 2.0, engine 4.5</dd>" in page
    assert re.search(r"<dt>date</dt><dd>\d{4}-\d\d-\d\d \d\d:\d\d UTC</dd>", page)
