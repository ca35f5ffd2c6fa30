"""Removal of killed runs' unfinished uploads at the start of a run."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import pytest

from rlhf.config import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.store.gc import GRACE
from tasks.preflight import preflight
from tests.servers import client_of


def config(store: str, work: str) -> PipelineConfig:
    here = {"runtime": {"work_dir": work}, "tracking": {"trackers": []}}
    return PipelineConfig.model_validate({"store": store, **here})


def test_unfinished_uploads_go_when_they_are_old(tmp_path, caplog):
    left = tmp_path / "store" / "tmp"
    left.mkdir(parents=True)
    for name, age in (("old", GRACE + 60), ("young", GRACE - 60)):
        (left / name).write_bytes(b"half")
        os.utime(left / name, (time.time() - age,) * 2)
    with caplog.at_level("INFO"):
        preflight(config(str(tmp_path / "store"), str(tmp_path / "work")))
    assert [path.name for path in left.iterdir()] == ["young"]
    assert "removed 1 unfinished uploads of killed runs" in caplog.text


def test_a_base_in_4_bits_needs_its_package_where_the_stage_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    here = config(str(tmp_path / "store"), str(tmp_path / "work")).model_dump(exclude_unset=True)
    sft = {"lora": {}, "frozen_dtype": "nf4"}
    values = {**here, "base": {"path": str(tmp_path)}, "sft": sft}
    message = r"sft\.frozen_dtype = 'nf4' needs bitsandbytes, .* not installed; run `pip install"
    with pytest.raises(ConfigError, match=message):
        preflight(PipelineConfig.model_validate(values))
    for other in ({"placement": {"train-sft": "gpu"}}, {"sft": {**sft, "enabled": False}}):
        with pytest.raises(ConfigError, match="no model there"):  # by the check that follows
            preflight(PipelineConfig.model_validate({**values, **other}))


@pytest.mark.s3
def test_who_must_not_list_uploads_can_run(s3_server, tmp_path, monkeypatch, caplog):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = "no-listing"
    denied: dict[str, Any] = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:ListBucketMultipartUploads",
        "Resource": f"arn:aws:s3:::{bucket}",
    }
    with client_of(s3_server, bucket) as client:
        policy = {"Version": "2012-10-17", "Statement": [denied]}
        client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        with caplog.at_level("DEBUG", logger="tasks.preflight"):
            preflight(config(f"s3://{bucket}/store", str(tmp_path / "work")))
        assert "unfinished uploads stay where they are" in caplog.text
        client.delete_bucket_policy(Bucket=bucket)
        client.delete_bucket(Bucket=bucket)
