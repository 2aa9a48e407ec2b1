"""The result of a finished run: the content of `summary.json`."""

from typing import Any

from tdlrt.report import LayerSummary
from tdlrt_lab.data import DataRecord
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.training import Training

__all__ = ["run_summary"]


def run_summary(training: Training, record: DataRecord, command: str | None) -> dict[str, Any]:
    """The result of a finished training.

    Args:
        training: The training.
        record: That of its data.
        command: The command line that started the run.
    """
    config, size, last = training.config, training.size, training.history[-1]
    cost, options = training.summary(), training.method.options
    return {
        "command": command,
        "model": config.model,
        "data": config.data,
        "method": config.method,
        "tau": config.tau if "tau" in options else None,
        "budget": config.budget if "budget" in options else None,
        "seed": config.seed,
        "epochs": config.epochs,
        "split": last.split,
        "accuracy": last.accuracy,
        "dense_accuracy": last.accuracy if config.method == "dense" else None,
        "bits_per_character": last.bits_per_character,
        "dense_bits_per_character": last.bits_per_character if config.method == "dense" else None,
        "compression": size.compression,
        "network_compression": size.network_compression,
        "parameters": last.parameters,
        "dense_parameters": size.dense_parameters or size.network_dense_parameters,
        "network_parameters": size.network_parameters,
        "network_dense_parameters": size.network_dense_parameters,
        "macs": cost.macs,
        "dense_macs": training.dense_macs,
        "ranks": last.ranks,
        "layers": [_layer(row) for row in cost.rows],
        "skipped_steps": training.skipped_steps,
        "seconds": sum(metrics.seconds for metrics in training.history),
        "dense_seconds": None,
        "versions": versions(),
        "machine": machine(training.device),
        "text" if last.bits_per_character is not None else "images": record,
        "config": config.to_dict(),
    }


def _layer(row: LayerSummary) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "shape": list(row.shape),
        "ranks": None if row.ranks is None else list(row.ranks),
        "parameters": row.parameters,
        "dense_parameters": row.dense_parameters,
        "compression": row.compression,
        "macs": row.macs,
        "dense_macs": row.dense_macs,
    }
