"""A real S3-compatible server on loopback, for as long as a block runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

_numbers = count()


@contextmanager
def bucket(path: str = "banks/my bank") -> Iterator[str]:
    """An address in a new bucket; credentials and endpoint stand in the environment meanwhile."""
    name = f"memories-{next(_numbers)}"  # one process has one store behind all of its servers
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
        }.items():
            patch.setenv(key, value)
        try:
            urlopen(Request(f"http://{host}:{port}/{name}", method="PUT")).close()
            yield f"s3://{name}/{path}"
        finally:
            server.stop()
