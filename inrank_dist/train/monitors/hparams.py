"""What TensorBoard's page HPARAMS shows of a run: its settings and the last values of some curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...runtime import yaml_text
from .text import number

METRICS = (
    *("eval/loss", "eval/bits_per_byte", "eval/perplexity", "train/loss"),
    *("train/parameters", "train/tokens", "train/flops", "train/mean_rank", "train/mean_null_rank"),
    *("speed/seconds", "speed/tokens_per_s", "speed/peak_memory"),
)
"""Tags whose last values are shown. TensorBoard takes this list from one run for all of them, so it never differs."""

LEFT_OUT = ("run.name", "run.dir", "data.cache_dir", "checkpoint.", "eval.", "log.", "parallel.")
"""Settings, or sections, that do not change what is trained."""

FIRST = ("lowrank.mode", "model.hidden_size", "optimizer.lr", "optimizer.name", "run.seed")
"""Settings that have a column unless the user chooses others."""


def session(config: Mapping[str, Mapping[str, Any]]) -> tuple[list[Any], Any]:
    """Return the summaries for the start of a run, and the one that says that it has finished.

    Args:
        config: section -> key -> value.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    start, infos = plugin_data_pb2.SessionStartInfo(), []
    for section, settings in config.items():
        for key, value in settings.items():
            name = f"{section}.{key}"
            if not name.startswith(LEFT_OUT):
                kind = _assign(start.hparams[name], value)
                infos.append(api_pb2.HParamInfo(name=name, type=kind, differs=name in FIRST))
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.STATUS_SUCCESS)
    begin = [
        _summary(metadata.EXPERIMENT_TAG, experiment=experiment),
        _summary(metadata.SESSION_START_INFO_TAG, session_start_info=start),
    ]
    return begin, _summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def _assign(target: Any, value: Any) -> int:
    """Set a protobuf value to that of a setting, and return its type for TensorBoard."""
    from tensorboard.plugins.hparams import api_pb2

    if isinstance(value, bool):
        target.bool_value = value
        return int(api_pb2.DATA_TYPE_BOOL)
    if (finite := number(value)) is not None:
        target.number_value = finite
        return int(api_pb2.DATA_TYPE_FLOAT64)
    target.string_value = yaml_text.shown(value)
    return int(api_pb2.DATA_TYPE_STRING)


def _summary(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    known = metadata.create_summary_metadata(data)
    return Summary(value=[Summary.Value(tag=tag, metadata=known)])
