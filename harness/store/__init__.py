"""The run store: `runs/<run_id>/` holds everything a run knows, trackers are mirrors.

    config.yaml environment.json status.json metrics.json events.jsonl lock blocks/NNNN.safetensors
    blocks/NNNN.<tuner>.safetensors outliers.json samples/<stage>/<task>.json tracking/
    _shared/<kind>/<key>.{json,safetensors,lock}   records many runs read, outside any run
    _sweeps/<sweep>/<job>.json                     one record a sweep job

Every file is replaced in one step, so a reader or a killed writer never leaves a half. Whatever
enters a number again is checked when it is read: a damaged record is said once and counts as
absent. Imports no torch.
"""

from harness.store.files import (
    RunLocked,
    append,
    aside,
    held,
    locked,
    read_json,
    replacing,
    whole_lines,
    writable,
    write,
    write_json,
)
from harness.store.provenance import environment, version
from harness.store.records import checked, read_record, write_checked, write_record
from harness.store.run import Run
from harness.store.store import Store
from harness.store.tensors import intact, load_tensors, save_tensors

__all__ = [
    "Run",
    "RunLocked",
    "Store",
    "append",
    "aside",
    "checked",
    "environment",
    "held",
    "intact",
    "load_tensors",
    "locked",
    "read_json",
    "read_record",
    "replacing",
    "save_tensors",
    "version",
    "whole_lines",
    "writable",
    "write",
    "write_checked",
    "write_json",
    "write_record",
]
