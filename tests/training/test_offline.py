"""A run talks to nobody: not one connection leaves the machine."""

import socket

import pytest

from grpo.jobs.train_grpo import main


def test_a_run_opens_no_connection_to_the_outside(tmp_path, monkeypatch):
    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"a look-up of {host}"))
    main(["--config", "train_configs/debug.toml", "--training.steps", "2", "--metrics.run_dir", str(tmp_path)])
    assert (tmp_path / "report.html").exists()
