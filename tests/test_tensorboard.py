"""What TensorBoard shows of a run, read back from its event files as TensorBoard reads them."""

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from runs import small_config
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.text import text_plugin
from test_monitors import LAYERS, START, SUMMARY, check, grow, step

from inrank_dist.train.monitors import TensorBoardMonitor
from inrank_dist.train.monitors.hparams import FIRST, METRICS
from inrank_dist.train.monitors.scalars import Curves, verbatim
from inrank_dist.train.monitors.tensorboard import layout

EVALUATION = {"kind": "eval", "step": 2, "loss": 4.5, "perplexity": 90.0, "bits_per_byte": 1.5}


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), {TENSORS: 0})
    found.Reload()
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def text(folder: Path, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events(folder).Tensors(f"{tag}/text_summary")]


def write(folder: Path, *records: dict[str, Any], **options: Any) -> None:
    monitor = TensorBoardMonitor(folder, **options)
    for record in records:
        monitor.write(record)
    monitor.close()
    monitor.close()


def test_tags_and_values_can_be_read_back(tmp_path: Path) -> None:
    write(tmp_path, START, step(1), check(2), grow(2), step(2, loss=None), EVALUATION, {"kind": "new"})
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, pytest.approx(4.999))]
    assert found["train/lr"] == [(1, pytest.approx(6e-4)), (2, pytest.approx(6e-4))]
    for tag in ("train/grad_norm", "speed/tokens_per_s", "speed/data_wait", "train/parameters", "train/tokens"):
        assert len(found[tag]) == 2, tag
    assert found["eval/loss"] == [(2, 4.5)] and found["eval/perplexity"] == [(2, 90.0)]
    assert found["eval/bits_per_byte"] == [(2, 1.5)]
    assert found["weights/rank/blocks.0.mlp.down"][-1] == (2, 16.0)
    assert found["weights/null_rank/blocks.0.mlp.down"][-1] == (2, 31.0)
    assert found["weights/explained/blocks.0.mlp.up"][0] == (2, pytest.approx(0.91))
    assert found["weights/effective_rank/blocks.0.mlp.up"][0] == (2, 6.5)
    assert found["train/mean_rank"][-1] == (2, 15.0) and found["train/mean_null_rank"][-1] == (2, 31.0)
    assert found["speed/rank_event_seconds"] == [(2, pytest.approx(0.04))]


def test_tags_of_single_layers_are_in_one_group_which_is_the_last(tmp_path: Path) -> None:
    """TensorBoard folds a group and sorts them by name."""
    write(tmp_path, START, step(1), check(2), grow(2), EVALUATION, SUMMARY)
    groups = Counter(tag.split("/")[0] for tag in scalars(tmp_path))
    assert sorted(groups) == ["eval", "speed", "train", "weights"]
    assert groups["weights"] == 4 * len(LAYERS)


def test_the_summary_adds_what_no_step_has(tmp_path: Path) -> None:
    write(tmp_path, START, step(1), SUMMARY)
    found = scalars(tmp_path)
    assert [at for at, _ in found["train/loss"]] == [1] and found["speed/seconds"] == [(1000, 751.0)]
    assert found["eval/loss"] == [(1000, pytest.approx(3.566))]


def test_an_event_outranks_a_check_of_the_same_step(tmp_path: Path) -> None:
    """Which of the two the loop emits first must not decide what the curve shows."""
    write(tmp_path, grow(2), check(2))
    assert {value for _, value in scalars(tmp_path)["weights/rank/blocks.0.mlp.down"]} == {16.0}


def test_a_resumed_run_hides_what_it_trains_again(tmp_path: Path) -> None:
    write(tmp_path, *(step(number, loss=1.0) for number in range(1, 6)))
    time.sleep(1.1)  # event files are read in the order of their names, which count seconds
    write(tmp_path, step(4, loss=2.0), purge_step=4)
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_tags_of_updates_and_of_the_sources_of_a_mixture() -> None:
    curves = Curves()
    layer = {"effective_rank": 3.0, "stable_rank": 2.0, "null_effective_rank": 9.0, "null_stable_rank": None}
    made = curves.entries({"kind": "updates", "step": 5, "layers": {"a": layer}})
    assert made.step == 5
    values = {"update_effective_rank": 3, "update_stable_rank": 2, "update_null_effective_rank": 9}
    assert made.scalars == {f"weights/{tag}/a": value for tag, value in values.items()}
    made = curves.entries({"kind": "eval", "step": 6, "loss": 2.0, "perplexity": 7.4, "sources": {"x": 1.0, "y": 3.0}})
    assert made.scalars["eval/loss/x"] == 1.0 and made.scalars["eval/loss/y"] == 3.0


def test_histograms_count_the_singular_values_that_are_not_recorded() -> None:
    """Of 100 values that fall by a constant factor, the first two and every tenth are recorded."""
    indices = [1, 2, *range(10, 101, 10)]
    layer = {"rank": 3, "indices": indices, "sigma": [10 ** (-index / 50) for index in indices]}
    made = Curves().entries({"kind": "rank_check", "step": 5, "layers": {"a": layer, "b": {"rank": 2}}})
    assert list(made.histograms) == ["weights/log10_singular_values/a"]
    assert made.histograms["weights/log10_singular_values/a"] == pytest.approx([-i / 50 for i in range(1, 101)])
    zeros = {"indices": [1, 2, 3], "sigma": [1.0, 0.1, 0.0]}
    made = Curves().entries({"kind": "updates", "step": 5, "layers": {"a": zeros}})
    assert made.histograms == {"weights/update_log10_singular_values/a": [0.0, -1.0]}


def test_histograms_of_spectra_are_written(tmp_path: Path) -> None:
    record = check(2)
    record["layers"] = {
        name: {**each, "indices": [1, 2], "sigma": [2.0, 1.0]} for name, each in record["layers"].items()
    }
    write(tmp_path, START, record)
    found = events(tmp_path)
    assert sorted(found.Tags()["histograms"]) == sorted(f"weights/log10_singular_values/{name}" for name in LAYERS)
    assert found.Histograms("weights/log10_singular_values/blocks.0.mlp.up")[0].histogram_value.num == 2


HOSTILE = "\n\n# <script>alert(1)</script>\n\n* **no** list\r\n\t\x0b`a`\u2028| b |\u202e right to left" + "x" * 10_000


def test_a_sample_is_shown_as_it_is(tmp_path: Path) -> None:
    """Markdown and HTML in it are text: TensorBoard's page has one preformatted block and no other element."""
    write(tmp_path, {"kind": "sample", "step": 3, "prompt": "<b>It</b>", "text": HOSTILE})
    (markdown,) = text(tmp_path, "sample")
    assert markdown == verbatim(f"<b>It</b>{HOSTILE}")
    html = text_plugin.plugin_util.markdown_to_safe_html(markdown)
    assert html.startswith("<pre><code>&lt;b&gt;It&lt;/b&gt;") and html.rstrip().endswith("</code></pre>")
    assert html.count("<") == 4 and "# &lt;script&gt;alert(1)&lt;/script&gt;" in html and "**no** list" in html


def test_the_table_of_ranks_is_written_at_every_event(tmp_path: Path) -> None:
    write(tmp_path, START, grow(2), check(3), grow(4), SUMMARY)
    tables = text(tmp_path, "rank_table")
    assert len(tables) == 3 and all("| `blocks.0.mlp.down` | 16 | 16 | 31 | 0.820 |" in table for table in tables[:2])


def test_settings_and_final_metrics_are_hparams(tmp_path: Path) -> None:
    config = small_config(tmp_path, run__name="<b>", optimizer__lr=0.25)
    write(tmp_path, START, step(1), EVALUATION, check(2), grow(2), SUMMARY, config=config.to_yaml())
    found = events(tmp_path)
    content = found.PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(content["_hparams_/experiment"])
    start = metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    assert "_hparams_/session_end_info" in content
    assert [each.name.tag for each in experiment.metric_infos] == list(METRICS)
    known = scalars(tmp_path).keys()
    assert {"eval/loss", "eval/bits_per_byte", "train/parameters", "train/mean_rank", "speed/seconds"} <= known
    assert {each.name for each in experiment.hparam_infos} == start.hparams.keys()
    assert {each.name for each in experiment.hparam_infos if each.differs} == set(FIRST)
    assert start.hparams["optimizer.lr"].number_value == 0.25 and not start.hparams["train.compile"].bool_value
    assert start.hparams["lowrank.targets"].string_value == "[all]"
    assert not any(name.startswith(("checkpoint.", "log.", "run.name")) for name in start.hparams)


def test_an_unfinished_run_is_not_a_finished_session(tmp_path: Path) -> None:
    write(tmp_path, START, step(1), config=small_config(tmp_path).to_yaml())
    assert sorted(events(tmp_path).PluginTagToContent("hparams")) == [
        "_hparams_/experiment",
        "_hparams_/session_start_info",
    ]


def test_charts_have_the_tags_that_runs_write(tmp_path: Path) -> None:
    """Every expression of the layout matches a tag, as TensorBoard matches it; layers of one kind share a chart."""
    start = {**START, "ranks": {f"blocks.{block}.mlp.{part}": 8 for block in (0, 11) for part in ("up", "down")}}
    records = [step(1), check(2), grow(2), EVALUATION | {"sources": {"x": 1.0}}]
    write(tmp_path, start | {"sources": [{"label": "x"}]}, *records)
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    shown = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in shown.category for chart in category.chart}
    assert [category.title for category in shown.category] == ["training", "rank", "speed"]
    tags = scalars(tmp_path)
    for title, expressions in charts.items():
        for expression in expressions:
            assert any(re.match(expression, tag) for tag in tags), title
    assert [title for title in charts if title.startswith("rank of")] == [
        "rank of blocks.#.mlp.up",
        "rank of blocks.#.mlp.down",
    ]


def test_a_full_rank_run_has_no_charts_of_ranks() -> None:
    assert list(layout({**START, "mode": "full", "ranks": {}})) == ["training", "speed"]
