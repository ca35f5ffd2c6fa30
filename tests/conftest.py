"""Fixtures that several folders of tests share."""

from tests.ceph import s3_server

__all__ = ["s3_server"]
